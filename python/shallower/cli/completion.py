"""``shallower completion``: the scripts by which a shell asks for commands, options and values."""

from typing import Annotated, Literal

import typer

_BASH = """\
# Completion of shallower for bash; needs bash 4.4.
_shallower() {
    local found
    COMPREPLY=()
    found=$("$1" completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null) || {
        compopt -o default
        return
    }
    while IFS=$'\\t' read -r found _; do
        [ -n "$found" ] && COMPREPLY+=("$found")
    done <<< "$found"
}
complete -F _shallower shallower
"""

_ZSH = """\
#compdef shallower
# Completion of shallower for zsh, behind compinit.
_shallower() {
    local text line
    local -a found
    text=$("${(Q)words[1]}" completion --words "${(@Q)words[2,CURRENT]}" 2> /dev/null) || {
        _files
        return
    }
    for line in ${(f)text}; do
        found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
    done
    _describe -V 'shallower' found
}
if [ "$funcstack[1]" = "_shallower" ]; then _shallower "$@"; else compdef _shallower shallower; fi
"""

_FISH = """\
# Completion of shallower for fish.
function __shallower
    set -l words (commandline -opc)
    set -l found ($words[1] completion --words $words[2..-1] (commandline -ct) 2> /dev/null)
    if test $status -eq 0
        string join -- \\n $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c shallower -f -a '(__shallower)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion_command(
    shell: Annotated[
        Literal["bash", "zsh", "fish"],
        typer.Argument(metavar="SHELL", help="The shell: bash, zsh or fish."),
    ],
) -> None:
    """Print the script that completes commands and options in a shell.

    For bash, in ~/.bashrc: eval "$(shallower completion bash)". For zsh, in ~/.zshrc
    behind compinit: eval "$(shallower completion zsh)". For fish, in
    ~/.config/fish/config.fish: shallower completion fish | source.
    """
    print(SCRIPTS[shell], end="")
