"""What an operator sets about jobs: ``HORIZONPLAN_JOBS__...``, such as ``HORIZONPLAN_JOBS__LEASE_SECONDS=10``."""

from pydantic import BaseModel, ConfigDict, Field

FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class Registered(BaseModel):
    """A model of the operator's, with its data; both ``module:function``, importable where the worker runs.

    Attributes:
        model: returns an ``nn.Module``.
        data: returns a DataLoader, a list of batches, a Dataset, or a pair of which the second is to validate on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(pattern=FUNCTION)
    data: str = Field(pattern=FUNCTION)


class JobSettings(BaseModel):
    """Limits of jobs, and who runs them.

    Attributes:
        workers: worker processes that ``horizonplan serve`` keeps beside the server; 0: they are run elsewhere.
        models: what jobs may ask for by id.
        lease_seconds: a worker that has not been heard of for so long has lost its job.
        poll_seconds: between two looks into the database, of workers and of open streams.
        requeues: how often a job whose worker was lost is queued again.
        max_queued: the most jobs that wait.
        seconds: wall-clock limit of a job, imports included.
        memory_bytes: what a job's process may allocate; torch alone takes 300 MB.
        file_bytes: the largest file that it may write.
        threads: of a job's process; its CPU time is limited to as many times ``seconds``.
        max_parameters: of a model that is measured.
        max_simulated_parameters: of a model on a simulated card, which allocates nothing.
        user: name of the user that jobs run as, where the worker runs as root.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, ge=0, le=64)
    models: dict[str, Registered] = {}
    lease_seconds: float = Field(30.0, ge=0.1, le=3600)
    poll_seconds: float = Field(0.5, ge=0.01, le=60)
    requeues: int = Field(2, ge=0, le=100)
    max_queued: int = Field(100, ge=1)
    seconds: float = Field(600.0, gt=0, le=7 * 86_400)
    memory_bytes: int = Field(4 * 1024**3, ge=512 * 1024**2)
    file_bytes: int = Field(64 * 1024**2, ge=1024**2)
    threads: int = Field(1, ge=1, le=1024)
    max_parameters: int = Field(50_000_000, ge=1)
    max_simulated_parameters: int = Field(100_000_000_000, ge=1)
    user: str | None = None
