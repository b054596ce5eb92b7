"""Where the MLflow store is, and its address as it may be shown. Needs no MLflow."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from pipeline import config

SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME")
"""Environment variables whose values are never shown."""


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else SQLite beside params.yaml. A relative SQLite path starts there, too; in the temporary
    folder of a DVC experiment, it starts in the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    relative = uri.removeprefix("sqlite:///")
    if relative == uri or Path(relative).is_absolute():
        return uri
    return f"{sqlite_uri(config.PROJECT)}/{relative}"


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite file. Only what must be escaped is escaped: for a folder with other escapes in its name,
    MLflow creates a second one, which stays empty."""
    return "sqlite:///" + path.as_posix().replace("%", "%25").replace("?", "%3F")


def database_file() -> Path | None:
    """The file of an SQLite store; None for any other store."""
    uri = store_uri()
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(unquote(path.partition("?")[0]))


def shown_uri() -> str:
    """The store as a person may type it in the project's folder, without a name, a password or a token."""
    return hide_secrets(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


def public_uri() -> str:
    """The address of the store, absolute, without a name, a password or a token. The same whatever the environment's
    secrets are."""
    return _hide_credentials(store_uri())


def experiment_name(setting: str) -> str:
    """The MLflow experiment: MLFLOW_EXPERIMENT_NAME, else the setting."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or setting


def hide_secrets(text: str) -> str:
    """`text` without the names and passwords in addresses, and without the secrets of MLflow's environment."""
    text = _hide_credentials(text)
    for secret in (os.environ.get(name, "") for name in SECRETS):
        if len(secret) > 2:
            text = text.replace(secret, "***")
    return text


def _hide_credentials(text: str) -> str:
    """`text` without what stands before the @ in addresses, and without the values of secret fields. As SQLAlchemy
    reads it, a password may hold `/` and `@`; `host:5000/` is no name and password."""
    text = re.sub(r"(?<=://)(?:[^:/@\s]*:(?!\d+/)\S*|[^/\s]+)@", "", text)
    return re.sub(r"(?i)((?:password|passwd|pwd|token|secret|api_?key)=)[^&\s]+", r"\1***", text)
