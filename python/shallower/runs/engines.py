"""The workers that a command asks for: processes of this machine, or actors of a Ray cluster."""

from .units import Engine, Job


def workers_of(job: Job, workers: int | None, *, on: str, gpus: int = 1) -> Engine:
    """Workers for a job, ``local`` or ``ray``; each takes so many GPUs of a cluster that has any.

    ProcessesError: there can be none.
    """
    if on == "ray":
        from .ray_workers import RayWorkers

        return RayWorkers(job, workers, gpus=gpus)
    from .local_workers import LocalWorkers

    return LocalWorkers(job, workers or 1)
