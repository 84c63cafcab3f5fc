from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from hanse.cell import wire_pb2
from hanse.cell.rpc import SERVICE

SOURCE = Path(wire_pb2.__file__).parents[2]


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    out = tmp_path / "wire.bin"
    arguments = ["protoc", f"-I{SOURCE}", f"--descriptor_set_out={out}", str(SOURCE / "hanse/cell/wire.proto")]
    assert protoc.main(arguments) == 0
    (made,) = FileDescriptorSet.FromString(out.read_bytes()).file
    committed = FileDescriptorProto.FromString(wire_pb2.DESCRIPTOR.serialized_pb)
    made.ClearField("source_code_info")
    for each in (made, committed):
        for message in (*each.message_type, *(nested for top in each.message_type for nested in top.nested_type)):
            for field in message.field:
                field.ClearField("json_name")
    assert made == committed


def test_the_service_has_the_methods_that_the_listener_serves() -> None:
    service = wire_pb2.DESCRIPTOR.services_by_name["Wire"]
    assert service.full_name == SERVICE
    assert {method.name for method in service.methods} == {"Connect", "Missing", "Download", "Upload"}


def test_field_numbers_never_change() -> None:
    numbers = {field.name: field.number for field in wire_pb2.Frame.DESCRIPTOR.fields}
    assert numbers == {
        "id": 1, "kind": 2, "origin": 3, "destination": 4, "channel": 5, "topic": 6, "headers": 7, "payload": 8,
    }  # fmt: skip
    assert wire_pb2.Chunk.DESCRIPTOR.fields_by_name["data"].number == 1
    assert wire_pb2.UploadPart.DESCRIPTOR.fields_by_name["data"].number == 1
