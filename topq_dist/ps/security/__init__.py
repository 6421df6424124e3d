"""Addresses, TLS and tokens: who may listen where, and speak as whom."""

from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls
from topq_dist.ps.security.tokens import Authenticator, read_token

__all__ = [
    "Address",
    "Authenticator",
    "ClientSecurity",
    "ClientTls",
    "ServerSecurity",
    "ServerTls",
    "read_token",
]
