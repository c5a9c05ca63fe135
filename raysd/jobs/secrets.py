"""What looks like a secret: text that must not stand in a job, variables that stay here, files that are not sent."""

import re
from fnmatch import fnmatch
from pathlib import PurePosixPath

TEXT = re.compile(
    r"://[^/@\s]*:[^/@\s]+@"  # user:password@host
    r"|[?&](?:X-Amz-Signature|X-Goog-Signature|Signature|sig|token|access_token|api_key)="
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{24,}",
    re.IGNORECASE,
)
VARIABLES = ("DATABASE", "KEY", "SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL")
FILES = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk"),
    *(
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        ".netrc",
        "_netrc",
        ".pgpass",
        ".npmrc",
        ".pypirc",
        ".htpasswd",
    ),
    *("credentials", "credentials.*", "*credentials.json", "service-account*.json", "service_account*.json"),
    *(
        "auth_token",
        "*.token",
        "kubeconfig",
        "*.kubeconfig",
        "*.tfstate",
        "*.tfvars",
        ".git-credentials",
        ".boto",
        ".s3cfg",
    ),
)
DOCUMENTS = ("", ".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".conf", ".txt")
"""Suffixes of files that are taken for secrets when they are called `secret` or `secrets`: code is not."""
FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".azure", ".gcloud", ".docker"}
EXAMPLES = (".example", ".sample", ".template", ".dist", ".pub")
KEY = b"PRIVATE KEY-----"


def holds_secret(text: str) -> bool:
    """Whether a word holds a password, a signature or a well-known kind of token."""
    return TEXT.search(text) is not None


def is_secret_variable(name: str, value: str) -> bool:
    return any(part in name.upper() for part in VARIABLES) or holds_secret(value)


def is_secret_file(path: str) -> bool:
    """By its name: a path relative to the folder that is sent, with "/"."""
    parts = PurePosixPath(path.lower())
    if FOLDERS & set(parts.parts[:-1]):
        return True
    if parts.name.endswith(EXAMPLES):
        return False
    named = parts.stem in ("secret", "secrets", ".secret", ".secrets") and parts.suffix in DOCUMENTS
    return named or any(fnmatch(parts.name, pattern) for pattern in FILES)


def is_secret_content(start: bytes) -> bool:
    """By its first bytes: a private key under whatever name."""
    head = start.lstrip()[:100]
    return head.startswith(b"-----BEGIN") and KEY in head
