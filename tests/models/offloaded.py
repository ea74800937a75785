"""Models whose weights are offloaded, without a GPU: their forward is on the CPU too."""

from accelerate import cpu_offload


def offloaded(model, layers=None):
    """Take the weights of a model, or of some of its layers, to a store beside it."""
    for module in [model] if layers is None else [model.model.layers[layer] for layer in layers]:
        cpu_offload(module, execution_device="cpu")
    model.hf_device_map = {"": "cpu"}  # as accelerate notes it for a GPU beside
    return model
