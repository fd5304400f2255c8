"""The layouts in src/ffi/xla_abi.h are those of the installed jaxlib's own header."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

ROOT = Path(__file__).resolve().parents[1]

STRUCTS = {
    "ApiVersion": ("XLA_FFI_Api_Version", {"major_version": "major_version", "minor_version": "minor_version"}),
    "ErrorCreateArgs": ("XLA_FFI_Error_Create_Args", {"message": "message", "code": "errc"}),
    "StreamGetArgs": ("XLA_FFI_Stream_Get_Args", {"context": "ctx", "stream": "stream"}),
    "DeviceOrdinalGetArgs": ("XLA_FFI_DeviceOrdinal_Get_Args", {"context": "ctx", "device_ordinal": "device_ordinal"}),
    "Api": (
        "XLA_FFI_Api",
        {
            "version": "api_version",
            "create_error": "XLA_FFI_Error_Create",
            "get_stream": "XLA_FFI_Stream_Get",
            "get_device_ordinal": "XLA_FFI_DeviceOrdinal_Get",
        },
    ),
    "Buffer": ("XLA_FFI_Buffer", {"dtype": "dtype", "data": "data", "rank": "rank", "dims": "dims"}),
    "ByteSpan": ("XLA_FFI_ByteSpan", {"data": "ptr", "size": "len"}),
    "Attributes": ("XLA_FFI_Attrs", {"size": "size", "types": "types", "names": "names", "values": "attrs"}),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        {"api": "api", "context": "ctx", "stage": "stage", "args": "args", "rets": "rets", "attrs": "attrs"},
    ),
    "Metadata": (
        "XLA_FFI_Metadata",
        {"api_version": "api_version", "traits": "traits", "state_type_id": "state_type_id"},
    ),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"base": "extension_base", "metadata": "metadata"}),
}
OPERANDS = {
    "XLA_FFI_Args": {"size": "size", "types": "types", "tensors": "args"},
    "XLA_FFI_Rets": {"size": "size", "types": "types", "tensors": "rets"},
}
VALUES = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "kUnimplemented": "XLA_FFI_Error_Code_UNIMPLEMENTED",
    "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    "kS32": "XLA_FFI_DataType_S32",
    "kF16": "XLA_FFI_DataType_F16",
    "kF32": "XLA_FFI_DataType_F32",
    "kBF16": "XLA_FFI_DataType_BF16",
    "kStringAttr": "XLA_FFI_AttrType_STRING",
    "kCommandBufferCompatible": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "kInitialize": "XLA_FFI_ExecutionStage_INITIALIZE",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "kApiMajor": "XLA_FFI_API_MAJOR",
}


def _program(wrong: str = "") -> str:
    checks = []
    for ours, (theirs, fields) in STRUCTS.items():
        checks += [f"offsetof(heed::xla::{ours}, {a}) == offsetof({theirs}, {b})" for a, b in fields.items()]
    for theirs, fields in OPERANDS.items():
        checks += [f"offsetof(heed::xla::Tensors, {a}) == offsetof({theirs}, {b})" for a, b in fields.items()]
        checks.append(f"sizeof(heed::xla::Tensors) == sizeof({theirs})")
    checks += [
        f"sizeof(heed::xla::{name}) == sizeof({STRUCTS[name][0]})" for name in ("Attributes", "Metadata", "Buffer")
    ]
    checks += [f"int(heed::xla::{ours}) == int({theirs})" for ours, theirs in VALUES.items()]
    checks.append("heed::xla::kApiMinor <= XLA_FFI_API_MINOR")
    if wrong:
        checks.append(wrong)
    asserts = "\n".join(f'static_assert({check}, "{check}");' for check in checks)
    return f'#include "xla/ffi/api/c_api.h"\n#include "ffi/xla_abi.h"\n{asserts}\n'


def _compiles(program: str) -> tuple[bool, str]:
    command = [shutil.which("c++") or "c++", "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", "-x", "c++", "-"]
    command += [f"-I{ROOT / 'src'}", f"-isystem{jax.ffi.include_dir()}"]
    result = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    return result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_layouts_and_values_are_those_of_jaxlib() -> None:
    compiles, message = _compiles(_program())
    assert compiles, message
    compiles, message = _compiles(_program(wrong="offsetof(heed::xla::Buffer, rank) == offsetof(XLA_FFI_Buffer, dims)"))
    assert not compiles and "static assertion failed" in message  # the comparison itself can fail
