"""What a step needs of a device, and what to do where it is not there."""
