"""The server from its address to Ctrl-C: where it listens, under which names, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Sequence

import click

from mka_export.errors import ServeError, printable
from mka_export.serve.artifacts import Servable
from mka_export.serve.scripts import Scripts
from mka_export.serve.server import Server
from mka_export.serve.site import site_of


def run(artifacts: Sequence[Servable], scripts: Scripts, host: str, port: int, *, tls: bool) -> None:
    """Serve ``artifacts`` until Ctrl-C; prints the URLs.

    Raises:
        ServeError: none of them can be opened in a browser, or the address cannot be listened on.
    """
    if all(artifact.obstacle for artifact in artifacts):
        first = artifacts[0]
        raise ServeError(f"{first.name} cannot be opened in a browser: {first.obstacle}", "Give another artifact.")
    names = {"localhost", host, socket.gethostname(), f"{socket.gethostname()}.local"}
    # Ctrl-C is how it ends, at whatever moment.
    with contextlib.suppress(KeyboardInterrupt), listen(artifacts, scripts, host, port, names) as server:
        addresses = _addresses(str(server.server_address[0]))
        if tls:
            from mka_export.serve.certificate import secure

            click.echo(f"certificate, SHA-256: {secure(server, [*sorted(names), *addresses])}", err=True)
        for artifact in artifacts:
            click.echo(printable(f"  {artifact.name}{_why_not(artifact)}"), err=True)
        if not tls and any(not ipaddress.ip_address(address).is_loopback for address in addresses):
            click.echo("other devices get one thread and keep no files, since this is plain http: see --tls", err=True)
        hosts = [f"[{address}]" if ":" in address else address for address in addresses]
        click.echo("\n".join(f"{'https' if tls else 'http'}://{each}:{server.server_port}/" for each in hosts))
        click.echo("Ctrl-C ends it.", err=True)
        server.serve_forever(poll_interval=0.2)


def listen(
    artifacts: Sequence[Servable], scripts: Scripts, host: str, port: int, names: set[str] | None = None
) -> Server:
    """Return a server that listens, and has not begun to answer."""
    site = site_of(artifacts, scripts)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return Server((str(address[0]), int(address[1])), site, names or {"localhost"}, family)
    except (socket.gaierror, UnicodeError) as error:  # the latter of names that no name server could know
        raise ServeError(f"--host {host} is no address", "Give one of this machine's, or 0.0.0.0 for all.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what, remedy = f"port {port} is in use", "Choose another --port, or --port 0 for any that is free."
        elif error.errno == errno.EADDRNOTAVAIL:
            what, remedy = f"--host {host} is no address of this machine", "Give one, or 0.0.0.0 for all."
        else:
            what, remedy = f"cannot listen on {host}, port {port}: {error.strerror}", "Choose another --port."
        raise ServeError(what, remedy) from error


def _why_not(artifact: Servable) -> str:
    return f": not offered, because {artifact.obstacle}" if artifact.obstacle else ""


def _addresses(bound: str) -> list[str]:
    """Return the addresses to reach a socket at: the one it is bound to, or all of this machine's."""
    if not ipaddress.ip_address(bound).is_unspecified:
        return [bound]
    import psutil

    families = {socket.AF_INET} if "." in bound else {socket.AF_INET, socket.AF_INET6}
    found = [each.address for all in psutil.net_if_addrs().values() for each in all if each.family in families]
    usable = [each for each in found if "%" not in each]  # a link's own needs the name of the interface, too
    return sorted(usable, key=lambda each: (ipaddress.ip_address(each).is_loopback, ":" in each, each))
