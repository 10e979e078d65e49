"""The options of a node that a command starts: said once, and taken whole (see `spread`)."""

from typing import Annotated

import msgspec
import typer

from shoal.node.options import DEFAULT_HTTP_PORT, DEFAULT_LISTEN

AllowHosts = Annotated[
    list[str] | None,
    typer.Option("--allow-host", help="A further name that the gateway is called by; may be repeated."),
]
AllowOrigins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="A web origin whose pages may call the gateway; may be repeated."),
]
Listen = Annotated[str, typer.Option(help="Where the fabric listens for other nodes.")]
Expose = Annotated[bool, typer.Option("--expose", help="Allow --listen beyond loopback; prints what that opens.")]
Memory = Annotated[str, typer.Option(help="What models may use here: 2GiB, 800MB; by default what is free.")]


class NodeFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` and `join` ask about the node; `start.run` takes these fields as flags."""

    api_keys: Annotated[str, typer.Option(help="File with one API key a line; demanded beyond loopback.")] = ""
    allow_hosts: AllowHosts = None
    allow_origins: AllowOrigins = None
    listen: Listen = DEFAULT_LISTEN
    expose: Expose = False
    discover: Annotated[bool, typer.Option("--discover", help="Find and be found on the LAN by multicast.")] = False
    name: Annotated[str, typer.Option(help="What to call this node; by default the host's name.")] = ""
    memory: Memory = ""
    threads: Annotated[int, typer.Option(help="Engine threads per shard; 0: all cores.", min=0, max=1024)] = 0
    slowdown: Annotated[
        float, typer.Option(help="Emulate a device this many times slower, for demos.", min=1.0, max=1000.0)
    ] = 1.0
    links: Annotated[
        list[str] | None,
        typer.Option("--link", help="Emulate a link, for demos: NODE_ID=10ms,50mbit; may be repeated."),
    ] = None
    watts: Annotated[
        float, typer.Option(help="Power above idle while it answers, as you know it; plans weigh it.", min=0.0, max=1e6)
    ] = 0.0
    price_per_hour: Annotated[
        float, typer.Option(help="Money for an hour of work here, in one currency for the fleet.", min=0.0, max=1e6)
    ] = 0.0
    joules_per_mb: Annotated[
        float,
        typer.Option(
            help="Energy of its network per MB it sends; 0.3 is a common estimate, nothing measures it.",
            min=0.0,
            max=1e6,
        ),
    ] = 0.0
    region: Annotated[str, typer.Option(help="Where it stands, for `shoal serve --regions`.")] = ""
    trust: Annotated[
        str, typer.Option(help="How far it is trusted, in a word of yours, for `shoal serve --trusts`.")
    ] = ""


class HereFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What `serve` asks about the node that it starts where none runs yet."""

    port: Annotated[
        int, typer.Option(help="Port of the gateway, if a node is started; 0 takes any free one.", min=0, max=65535)
    ] = DEFAULT_HTTP_PORT
    listen: Listen = DEFAULT_LISTEN
    expose: Expose = False
    memory: Memory = ""
    allow_hosts: AllowHosts = None
    allow_origins: AllowOrigins = None

    def node(self) -> NodeFlags:
        """As flags of `up`."""
        return NodeFlags(
            listen=self.listen,
            expose=self.expose,
            memory=self.memory,
            allow_hosts=self.allow_hosts,
            allow_origins=self.allow_origins,
        )


UP = NodeFlags()
JOIN = NodeFlags(listen="tcp/127.0.0.1:0")
HERE = HereFlags()
