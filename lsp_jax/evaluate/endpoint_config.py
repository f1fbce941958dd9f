"""The settings of an OpenAI-compatible endpoint: address, key, limits."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

import httpx2 as httpx

from lsp_jax.core.errors import InputError

DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class EndpointConfig:
    """A model at an OpenAI-compatible endpoint."""

    url: str = ""
    """Base URL of the endpoint, such as https://api.openai.com/v1; one that ends in /chat/completions is taken too."""
    model: str = ""
    """Name of the model at the endpoint; use a dated or versioned name, because results refer to it."""
    key_variable: str = DEFAULT_KEY
    """Environment variable with the API key; not needed for a local endpoint."""
    allow_local_http: bool = False
    """Allow http:// for an endpoint on the local host (localhost, 127.0.0.0/8, ::1)."""
    allow_http_hosts: tuple[str, ...] = ()
    """Names or addresses of hosts of the own network that may be asked over http://, unencrypted, such as gpu-box.lan.
    They need no key, and get one over http:// only from a `key_variable` other than the default."""
    concurrency: int = 8
    """Maximum number of parallel requests."""
    retries: int = 6
    """Retries when the endpoint is busy, cannot be reached or sends an invalid reply."""
    timeout: float = 120.0
    """Time limit of one reply, in seconds."""
    max_tokens: int = 1024
    """Maximum reply length in tokens."""
    input_price: float = 0.0
    """US dollars per million prompt tokens, for the cost estimate; 0: unknown."""
    output_price: float = 0.0
    """US dollars per million reply tokens; 0: unknown."""

    @property
    def base(self) -> str:
        """The URL that the paths of the API are appended to."""
        return self.url.rstrip("/").removesuffix("/chat/completions").rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on the local host."""
        name = httpx.URL(self.url).host
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @property
    def is_named(self) -> bool:
        """Whether the endpoint's host is one of `allow_http_hosts`."""
        return httpx.URL(self.url).host.lower() in {name.strip("[]").lower() for name in self.allow_http_hosts}

    @property
    def key(self) -> str:
        """The API key, "" if there is none or it must not be sent."""
        if httpx.URL(self.url).scheme == "http" and not self.is_local and self.key_variable == DEFAULT_KEY:
            return ""
        return os.environ.get(self.key_variable, "").strip()

    def check(self, field: str = "judge") -> None:
        """Raises InputError naming `field`.<name>; sends no requests."""
        try:
            url = httpx.URL(self.url)
            scheme, place, user = url.scheme, url.host, url.userinfo
        except httpx.InvalidURL as error:
            raise InputError(f"{field}.url", self.url, f"is not a URL ({error})") from error
        if user or url.query or url.fragment:
            remedy = f"must be a base such as https://HOST/v1; put the key into the environment ({self.key_variable})"
            raise InputError(f"{field}.url", f"{scheme}://{place}...", remedy)
        if not place or scheme not in ("https", "http"):
            raise InputError(f"{field}.url", self.url, "must begin with https:// and name a host")
        self._check_hosts(field)
        if scheme == "http" and not self.is_named and not (self.is_local and self.allow_local_http):
            remedy = f"must be https://; http:// only on the local host, with --{field}.allow-local-http"
            remedy += f", or on a host of your own network, with --{field}.allow-http-hosts {place}"
            raise InputError(f"{field}.url", self.url, remedy)
        if not self.model:
            raise InputError(f"{field}.model", self.model, "give the model's name at the endpoint")
        if not self.key and not self.is_local and not self.is_named:
            remedy = "contains no key: set this environment variable, or name another with "
            raise InputError(f"{field}.key_variable", self.key_variable, remedy + f"--{field}.key-variable")
        for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{field}.{name}", getattr(self, name), f"must be at least {least}")
        for name in ("input_price", "output_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{field}.{name}", getattr(self, name), "must be >= 0 and finite")
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"{field}.timeout", self.timeout, "must be a number of seconds above 0")

    def _check_hosts(self, field: str) -> None:
        for name in self.allow_http_hosts:
            try:
                public = ipaddress.ip_address(name.strip("[]")).is_global
            except ValueError:
                public = False
            if public or not name or set(name) & set("/@*?# ") or name.count(":") == 1:
                remedy = "must be the name or address of a host of your own network, without scheme, port and path"
                raise InputError(f"{field}.allow_http_hosts", name, remedy)
