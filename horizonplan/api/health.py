"""Whether the service lives, and whether it is ready."""

from fastapi import APIRouter, Request

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@router.get("/readyz")
def readyz(request: Request) -> dict[str, str]:
    """Whether the service can do its work, check by check."""
    return {name: check() or "ok" for name, check in request.app.state.checks.items()}
