"""The two classes used directly: construct, deploy, clients register, a job runs, shut down.

A program that has a server of its own in it looks like this. Everything is in one process here but the jobs, which
always run in processes of their own; and there is no TLS, which only loopback allows.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hanse import FLComponent, FLContext
from hanse.client.in_background import running_client
from hanse.events import EventType
from hanse.server import FederatedServer
from hanse.settings import ClientSettings

JOB = Path(__file__).resolve().parent / "digits"


class Printer(FLComponent):
    """Prints the rounds as they are committed."""

    def handle_event(self, event_type: EventType, fl_ctx: FLContext) -> None:
        """Print that a round is done."""
        if event_type is EventType.ROUND_DONE and fl_ctx.round:
            print(f"round {fl_ctx.round} of {fl_ctx.job_id} is committed")


def main() -> int:
    """Run the job of ``examples/digits`` with two clients; return 0 if it completed."""
    with tempfile.TemporaryDirectory(prefix="hanse-direct-") as name, ExitStack() as stack:
        folder = Path(name)
        server = FederatedServer(project_name="direct", min_num_clients=2, max_num_clients=2, handlers=[Printer()])
        stack.callback(server.fl_shutdown)
        grpc_args = {"service": {"target": "127.0.0.1:0", "scheme": "grpc"}}
        server.deploy(argparse.Namespace(workspace=folder / "server"), grpc_args, secure_train=False)

        clients = stack.enter_context(ExitStack())
        for number in range(2):
            settings = ClientSettings(
                project="direct",
                name=f"site-{number + 1}",
                servers=(server.get_cell().target,),
                config={"partition": number, "partitions": 2},
                tls=False,
            )
            clients.enter_context(running_client(settings, workspace=folder / settings.name))
        print("registered:", ", ".join(sorted(client.name for client in server.get_all_clients().values())))

        job_id = server.submit_job(JOB)
        record = server.wait_for_job(job_id, timeout_s=60)
        print(f"{record.job_id} {record.state}: {record.reason or record.result}")
        return 0 if record.state == "completed" else 1


if __name__ == "__main__":
    sys.exit(main())
