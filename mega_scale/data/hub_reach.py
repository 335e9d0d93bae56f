"""A quick look whether a hub name can be fetched, because the clients' own retries take most of a minute."""

from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

_PATIENCE = 5.0  # seconds

Reach = Literal["there", "absent", "unreachable"]


def look_up(name: str, kind: Literal["model", "dataset"]) -> Reach:
    """Ask the Hugging Face hub once for a name.

    Args:
        name: "name" or "owner/name".
        kind: What is looked for; tokenizers are models there.

    Returns:
        "there", "absent" (or hidden from this user), or "unreachable" (no network, offline mode).
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_PATIENCE)
    except GatedRepoError:  # it exists; fetching it will say how to ask for access
        return "there"
    except RepositoryNotFoundError:
        return "absent"
    except Exception:  # the HTTP client, and with it the errors of a missing network, differ between versions
        return "unreachable"
    return "there"
