"""The `tandem` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.options import RouterOptions, ServeOptions, WorkerOptions, command
from tandem.common.errors import TandemError

app = typer.Typer(
    name="tandem",
    help="Serves large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(help="Where the API answers.", envvar="TANDEM_URL")]
ApiKey = Annotated[str | None, typer.Option(help="If the server asks for one.", envvar="TANDEM_API_KEY")]
RayAddress = Annotated[str | None, typer.Option(help="Instead of --url: the Ray the cluster runs on.")]
ClusterName = Annotated[str, typer.Option(help="… and its name there.", envvar="TANDEM_CLUSTER")]
DEFAULT_URL = "http://127.0.0.1:8000"


@command(app, ServeOptions)
def serve(options: ServeOptions) -> None:
    """Start a cluster on this machine (or on a Ray you have) and serve a model."""
    from tandem.cluster.serve import Serve

    Serve(options).run()


@command(app, RouterOptions)
def router(options: RouterOptions) -> None:
    """Run one router in the foreground. Needs --redis-url and TANDEM_CLUSTER_KEY."""
    from tandem.cluster.roles import run_router

    raise typer.Exit(run_router(options))


@command(app, WorkerOptions)
def prefill(options: WorkerOptions) -> None:
    """Run one prefill worker in the foreground. Needs --redis-url and TANDEM_CLUSTER_KEY."""
    from tandem.cluster.roles import run_worker

    run_worker("prefill", options)


@command(app, WorkerOptions)
def decode(options: WorkerOptions) -> None:
    """Run one decode worker in the foreground. Needs --redis-url and TANDEM_CLUSTER_KEY."""
    from tandem.cluster.roles import run_worker

    run_worker("decode", options)


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="Default: the first one served.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
) -> None:
    """Talk to the model. Ctrl-C interrupts an answer, Ctrl-D leaves."""
    from tandem.cluster.chat import Chat, ChatOptions

    Chat(url, api_key, ChatOptions(model, system, max_tokens, temperature)).run()


@app.command()
def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="As the router sent it.")] = False,
) -> None:
    """Show the workers, their load and KV use."""
    from tandem.cluster.status import show

    show(url, api_key, as_json)


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(help="prefill=N and/or decode=M", metavar="ROLE=N…")],
    url: Url = DEFAULT_URL,
    ray_address: RayAddress = None,
    cluster: ClusterName = "default",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it to be done.", min=0.0)] = 300.0,
) -> None:
    """Grow or shrink the pools of a running cluster; workers that leave finish their requests first."""
    from tandem.cluster.scale import Target, parse_sizes, scale

    scale(parse_sizes(sizes), Target(url, ray_address, cluster), timeout)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Its name, as `tandem status` shows it.", metavar="WORKER")],
    url: Url = DEFAULT_URL,
    ray_address: RayAddress = None,
    cluster: ClusterName = "default",
    timeout: Annotated[
        float, typer.Option(help="Seconds its requests get; what then still runs goes on elsewhere.", min=0.0)
    ] = 120.0,
) -> None:
    """Let one worker finish its requests and leave. Another one takes its place: the pool keeps its size."""
    from tandem.cluster.scale import Target, drain

    drain(worker, Target(url, ray_address, cluster), timeout)


@app.command()
def restart(
    url: Url = DEFAULT_URL,
    ray_address: RayAddress = None,
    cluster: ClusterName = "default",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it to be done.", min=0.0)] = 3600.0,
) -> None:
    """Replace every worker, one after the other, without failing a request. A pool of one needs room for a second."""
    from tandem.cluster.scale import Target, restart

    restart(Target(url, ray_address, cluster), timeout)


@command(app, BenchOptions)
def bench(options: BenchOptions) -> None:
    """Put a load on OpenAI-compatible servers, time it, and compare them."""
    from tandem.cluster.bench.run import bench

    raise typer.Exit(bench(options))


@app.command("fault-proxy")
def fault_proxy(
    to: Annotated[str, typer.Option(help="Where connections go on.", metavar="HOST:PORT")],
    listen: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0: any free one.", min=0, max=65535)] = 0,
    seed: Annotated[int, typer.Option(help="Of what happens by chance.")] = 0,
) -> None:
    """A TCP proxy that is a bad network, for tests. Lines on stdin say how: up delay=0.1; both drop; heal."""
    from tandem.cluster.fault_proxy import run

    run(to, listen, seed)


def main() -> None:
    """Exit code 1 with one line for what an operator can put right, 2 for wrong usage."""
    try:
        app()
    except TandemError as exc:
        print(f"tandem: error: {exc.message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
