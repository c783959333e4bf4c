"""Where and how the runs of a sweep execute, for the command line and Python.

Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class ExecutionSettings(BaseModel):
    """Where and how the runs of a sweep execute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray: Annotated[
        str | None,
        Field(
            description="Run on the Ray cluster at this address (host:port, auto), or without one on a local cluster."
        ),
    ] = None
    workers: Annotated[
        int | None,
        Field(
            description="Number of parallel runs. [as many as cores and, by the estimates, memory allow]",
            ge=1,
        ),
    ] = None
    threads: Annotated[int | None, Field(description="Cores per run. [all cores, divided among the runs]", ge=1)] = None
    retries: Annotated[int, Field(description="Retries of a run that crashed or was killed.", ge=0)] = 2
