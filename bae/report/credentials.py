"""Find credentials in addresses, so that they are refused before they are written or shown anywhere.

An address is logged as a parameter, saved with the configuration and named in messages. So a user name or a password in
it would leak at many places; MLflow reads both from the environment instead.
"""

import re

_USER = r"https?://[^/\s?#]*@"  # http://user:password@host, http://token@host
_PASSWORD = r"[a-z][a-z0-9+.\-]*://[^/\s@:]*:(?!\d+(?:/|$))[^@\s]+@"  # postgresql://user:password@host/runs
_QUERY = r"[a-z][a-z0-9+.\-]*://\S*[?&](?:password|passwd|pwd|token|secret|api_?key)="
_CREDENTIALS = re.compile(f"{_USER}|{_PASSWORD}|{_QUERY}", re.IGNORECASE)


def has_credentials(text: str) -> bool:
    """Tell whether a text has an address with a user name or a password in it. A port is none."""
    return _CREDENTIALS.search(text) is not None


def refusal(key: str) -> str:
    """Return the sentence that refuses an address. It does not repeat it. key: where the address was written."""
    return (
        f"{key}: this address has a user name or a password in it, which would be written to files and shown; write "
        "it without, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment (for PostgreSQL "
        "PGUSER and PGPASSWORD)"
    )


def refuse_credentials(key: str, address: str) -> None:
    """Refuse an address that has credentials in it. Raises ValueError, which does not repeat them."""
    if has_credentials(address):
        raise ValueError(refusal(key))
