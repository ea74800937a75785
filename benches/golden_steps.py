"""The commands whose results are golden, and what each leaves."""

from dataclasses import dataclass

SMALL = "--max-length 64 --batch-size 8"
FEW = "--texts small.jsonl --eval-texts small_eval.jsonl --max-length 24 --batch-size 8"
TASKS = "--tasks-dir tasks --data {texts}/.. --max-items 4"


@dataclass(frozen=True)
class Step:
    """A command, the steps before it, and the files and folders it leaves that are hashed."""

    command: str
    needs: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


STEPS = {
    "scan": Step(
        f"scan model --texts {{texts}}/c4.jsonl --max-texts 12 {SMALL} --keep-samples --out scan",
        tensors=("scan/scan.safetensors",),
    ),
    "scan-positions": Step(
        f"scan {{gguf}} --texts {{texts}}/c4.jsonl --max-texts 12 {SMALL} --dtype float32 "
        "--metrics angular,cosine,relative_l2,norm_ratio --positions random:3 --out scan-positions",
        tensors=("scan-positions/scan.safetensors",),
    ),
    "analyse": Step(
        "analyse states.safetensors --out analysed",
        tensors=("analysed/scan.safetensors",),
    ),
    "plan": Step(
        "plan scan --n 4 --max-blocks 2 --protect-last 1 --top 3 --out plan",
        needs=("scan",),
        values=("plan/shallower_plan.json",),
    ),
    "plan-bootstrap": Step("plan scan --n 4 --bootstrap 200", needs=("scan",)),
    "plan-deepest": Step("plan scan --n 4 --strategy deepest", needs=("scan",)),
    "prune-disk": Step(
        "prune model --plan plan --verify --out cut",
        needs=("plan",),
        tensors=("cut",),
        whole=("cut/*.safetensors",),
        values=("cut/config.json", "cut/shallower_plan.json"),
    ),
    "prune-memory": Step(
        "prune model --drop 12:14,20 --dtype float32 --verify --out cut-memory",
        tensors=("cut-memory",),
        values=("cut-memory/config.json", "cut-memory/shallower_plan.json"),
    ),
    "prune-gguf": Step(
        "prune {gguf} --plan plan --out cut.gguf", needs=("plan",), whole=("cut.gguf",)
    ),
    "prune-as-gguf": Step(
        "prune {gguf} --drop 12:14 --as-gguf --out cut-gguf", whole=("cut-gguf/*.gguf",)
    ),
    "gain": Step("gain model --plan plan", needs=("plan",)),
    "gain-options": Step("gain {gguf} --drop 12:16 --forecast-device h100 --context 512 --batch 4"),
    "eval": Step(
        f"eval model --texts {{texts}}/c4_eval.jsonl --max-texts 8 {SMALL} --perplexity window.txt "
        "--context 128 --drop 12:14"
    ),
    "eval-tasks": Step(
        f"eval model --tasks boolq,hellaswag,lambada,said {TASKS} --num-shots 1 --pass-at 2 "
        "--batch-size 4 --drop 12:14 --dtype float32"
    ),
    "patch": Step(
        "patch model --drop 12:15 --texts {texts}/c4.jsonl --max-texts 24 --max-length 64 "
        "--num-tokens 1024 --batch-size 8 --eval-texts {texts}/c4_eval.jsonl --out patched",
        tensors=("patched",),
    ),
    "patch-small": Step(
        "patch small --drop 2,4:6 --texts small.jsonl --eval-texts small_eval.jsonl "
        "--dtype float32 --out patched-small",
        tensors=("patched-small",),
    ),
    "prune-small": Step(
        "prune small --drop 3:6 --out cut-small", whole=("cut-small/*.safetensors",)
    ),
    "heal": Step(
        "heal cut-small --texts small.jsonl --eval-texts small_eval.jsonl --original small "
        "--steps 4 --eval-every 2 --rank 4 --max-length 16 --batch-size 4 --dtype float32 "
        "--out adapters",
        needs=("prune-small",),
        tensors=("adapters/*.safetensors",),
    ),
    "merge": Step("merge adapters --out merged", needs=("heal",), tensors=("merged",)),
    "heal-kd": Step(
        "heal cut-small --original small --objective kd --texts small.jsonl --steps 3 --rank 4 "
        "--max-length 16 --batch-size 8 --dtype bfloat16 --attention --no-packing --from-patch "
        "--merge --out healed",
        needs=("prune-small",),
        tensors=("healed",),
    ),
    "compare": Step(
        f"compare small {FEW} --n 1,3 --judge loss --truth --out comparison",
        values=("comparison/*.csv",),
    ),
    "compare-kl": Step(
        f"compare small {FEW} --n 2 --judge kl --criteria angular,taylor,greedy --truth "
        "--out compare-kl",
        values=("compare-kl/*.csv",),
    ),
    "curve": Step(
        f"curve small {FEW} --n 2,4 --criteria recommended,angular,deepest --top 2 "
        f"--states cut,patched --tasks words --tasks-dir tasks --max-items 8 --out curve",
        values=("curve/*.csv",),
    ),
    "curve-healed": Step(
        f"curve small {FEW} --n 3 --criteria best_plan,greedy --patch quick --heal-steps 2 "
        "--states cut,patched,healed --out curve-healed",
        values=("curve-healed/*.csv",),
    ),
    "run": Step(
        "run model --texts {texts}/c4.jsonl --max-texts 24 --eval-texts {texts}/c4_eval.jsonl "
        f"--max-eval-texts 6 {SMALL} --n 3 --blocks 2 --top 1 --out run",
        tensors=("run/checkpoint",),
    ),
    "run-heal": Step(
        f"run small {FEW} --fraction 0.25 --top 2 --heal --heal-steps 2 --out run-heal",
        tensors=("run-heal/checkpoint", "run-heal/healed"),
    ),
    "run-knee": Step(
        f"run small {FEW} --max-loss 0.5 --out run-knee",
        tensors=("run-knee/checkpoint",),
    ),
    "demo": Step("demo --n 2 --max-texts 16 --out demo", tensors=("demo/checkpoint",)),
}
