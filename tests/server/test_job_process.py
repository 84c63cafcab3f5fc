from pathlib import Path

import msgspec

from hanse.ids import JobId, Ssid, Token
from hanse.job import JobSpec, WorkflowSpec
from hanse.launch.process import ProcessLauncher
from hanse.messages import Credentials
from hanse.server.run_process import PROCESS_MODULE
from hanse.server.run_spec import RunProcessSpec


async def test_process_that_cannot_go_on_ends_with_its_reason_as_the_logs_last_line(tmp_path: Path) -> None:
    spec = RunProcessSpec(
        job_id=JobId("job-1"),
        project="project",
        spec=JobSpec(name="job", workflow=WorkflowSpec("fedavg"), model="model:initial", client="client:app"),
        folder=str(tmp_path),
        epoch=1,
        parent_url=f"unix:{tmp_path}/nobody.sock",
        credentials=Credentials("server.job-1", Token("token"), "signature", Ssid("ssid")),
    )
    process = await ProcessLauncher().launch(
        PROCESS_MODULE, spec=msgspec.msgpack.encode(spec), log_path=tmp_path / "log", env={}, name="run job-1"
    )
    assert await process.wait() == 1
    assert process.log_tail(1) == f"hanse.errors.Unreachable: cannot reach {spec.parent_url}: No such file or directory"
