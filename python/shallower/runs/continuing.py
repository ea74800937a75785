"""A text continued by a model, as a sample of how it speaks."""

from typing import TYPE_CHECKING, Any

from ..progress import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    num_tokens: int = 32,
) -> str:
    """Continue a text greedily by ``num_tokens`` at most, whatever the model's settings prefer."""
    import torch

    from ..models.decoder import Decoder

    encoded = tokenizer(prompt, return_tensors="pt").to(Decoder.of(model).device)
    generate: Any = model.generate
    with torch.inference_mode(), hushed():
        output = generate(**encoded, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
