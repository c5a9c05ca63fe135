"""What looks like a secret: text that must not stand in a job, variables that stay here, files that are not sent."""

import re
from fnmatch import fnmatch
from pathlib import PurePosixPath

TOKEN = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{24,}",
    re.IGNORECASE,
)
URL = re.compile(
    r"://[^/@\s]*:[^/@\s]+@"  # user:password@host
    r"|[?&](?:X-Amz-Signature|X-Goog-Signature|Signature|sig|token|access_token|api_key)=",
    re.IGNORECASE,
)
VARIABLES = ("DATABASE", "KEY", "SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIAL")
FILES = (
    *(
        ".env",
        ".env.*",
        "*.env",
        ".envrc",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
        "*.kdbx",
        "*.ppk",
    ),
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
        ".vault-token",
        "*.tfstate*",
        "*.tfvars",
        ".git-credentials",
        ".boto",
        ".s3cfg",
    ),
)
DOCUMENTS = ("", ".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".conf", ".txt")
"""Suffixes of files that are taken for secrets when they are called `secret` or `secrets`, or hold a URL with a password:
code is not."""
FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".azure", ".gcloud", ".docker"}
EXAMPLES = (".example", ".sample", ".template", ".dist", ".pub")
KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:\s|\\[nr])")
"""A key's first line, whose end is escaped where it is a value of JSON."""


def holds_secret(text: str) -> bool:
    """Whether a word holds a password, a signature or a well-known kind of token."""
    return bool(TOKEN.search(text) or URL.search(text))


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


def is_secret_content(path: str, start: bytes) -> bool:
    """By its first bytes: a private key or a well-known kind of token; in a document also a URL with a password."""
    text = start.decode("latin-1")
    document = PurePosixPath(path.lower()).suffix in DOCUMENTS
    return bool(KEY.search(text) or TOKEN.search(text) or (document and URL.search(text)))
