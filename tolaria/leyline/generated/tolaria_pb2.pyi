from tolaria.leyline.generated import leyline_pb2 as _leyline_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecisionSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_SOURCE_UNKNOWN: _ClassVar[DecisionSource]
    DECISION_SOURCE_POLICY: _ClassVar[DecisionSource]
    DECISION_SOURCE_FALLBACK: _ClassVar[DecisionSource]
    DECISION_SOURCE_OPERATOR: _ClassVar[DecisionSource]
DECISION_SOURCE_UNKNOWN: DecisionSource
DECISION_SOURCE_POLICY: DecisionSource
DECISION_SOURCE_FALLBACK: DecisionSource
DECISION_SOURCE_OPERATOR: DecisionSource

class PolicyRequest(_message.Message):
    __slots__ = ("version", "state", "field_reports")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FIELD_REPORTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    state: _leyline_pb2.SystemStatePacket
    field_reports: _containers.RepeatedCompositeFieldContainer[_leyline_pb2.FieldReport]
    def __init__(self, version: _Optional[int] = ..., state: _Optional[_Union[_leyline_pb2.SystemStatePacket, _Mapping]] = ..., field_reports: _Optional[_Iterable[_Union[_leyline_pb2.FieldReport, _Mapping]]] = ...) -> None: ...

class PolicyReply(_message.Message):
    __slots__ = ("version", "commands", "policy_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    commands: _containers.RepeatedScalarFieldContainer[bytes]
    policy_version: str
    def __init__(self, version: _Optional[int] = ..., commands: _Optional[_Iterable[bytes]] = ..., policy_version: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("version", "boundary", "step_effective", "source", "reason", "conservative", "commands")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    STEP_EFFECTIVE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONSERVATIVE_FIELD_NUMBER: _ClassVar[int]
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    boundary: int
    step_effective: int
    source: DecisionSource
    reason: str
    conservative: bool
    commands: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, version: _Optional[int] = ..., boundary: _Optional[int] = ..., step_effective: _Optional[int] = ..., source: _Optional[_Union[DecisionSource, str]] = ..., reason: _Optional[str] = ..., conservative: _Optional[bool] = ..., commands: _Optional[_Iterable[bytes]] = ...) -> None: ...
