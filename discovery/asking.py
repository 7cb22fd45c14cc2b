"""The store's operations as requests of etcd's JSON gateway, and its answers as results: the way back of `etcdjson`.

Called by `mirror`, which asks members. Removed keys are always asked for, so that a `DeleteResult` is whole.
"""

from __future__ import annotations

from typing import Any

import msgspec

from discovery.operations import (
    Body,
    Compact,
    CompareClause,
    DeleteRequest,
    DeleteResult,
    LeaseGrant,
    LeaseResult,
    LeaseRevoke,
    PutRequest,
    PutResult,
    RangeRequest,
    RangeResult,
    Record,
    Result,
    TxnRequest,
    TxnResult,
)
from discovery.replies import Answer, Kv
from discovery.wire.errors import Internal

Json = dict[str, Any]
Step = RangeRequest | PutRequest | DeleteRequest | TxnRequest


def request(body: Body | RangeRequest) -> tuple[str, Json]:
    """Return the path and the JSON that ask for an operation."""
    match body:
        case LeaseGrant():
            return "/v3/lease/grant", {"ID": body.id, "TTL": body.ttl_s}
        case LeaseRevoke():
            return "/v3/lease/revoke", {"ID": body.id}
        case Compact():
            return "/v3/kv/compaction", {"revision": body.revision}
        case RangeRequest():
            return "/v3/kv/range", _fields(body)
        case PutRequest():
            return "/v3/kv/put", _fields(body)
        case DeleteRequest():
            return "/v3/kv/deleterange", _step(body)["request_delete_range"]
        case TxnRequest():
            return "/v3/kv/txn", _txn(body)


def result(body: Body | RangeRequest, answer: Answer) -> Result:
    """Return what an operation did."""
    match body:
        case LeaseGrant():
            return LeaseResult(answer.ID, answer.TTL)
        case LeaseRevoke() | Compact():
            return None
        case _:
            return _result(body, answer)


def record_of(kv: Kv) -> Record:
    """Return a key as the state has it."""
    return Record(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _fields(body: msgspec.Struct) -> Json:
    """Return the fields that are not as they are anyway; they have etcd's names already."""
    return {
        field.name: getattr(body, field.name)
        for field in msgspec.structs.fields(body)
        if getattr(body, field.name) != field.default
    }


def _txn(txn: TxnRequest) -> Json:
    return {
        "compare": [_compare(clause) for clause in txn.compare],
        "success": [_step(step) for step in txn.success],
        "failure": [_step(step) for step in txn.failure],
    }


def _step(step: Step) -> Json:
    match step:
        case RangeRequest():
            return {"request_range": _fields(step)}
        case PutRequest():
            return {"request_put": _fields(step)}
        case DeleteRequest():
            return {"request_delete_range": _fields(step) | {"prev_kv": True}}
        case TxnRequest():
            return {"request_txn": _txn(step)}


def _compare(clause: CompareClause) -> Json:
    names = {
        "VERSION": "version",
        "CREATE": "create_revision",
        "MOD": "mod_revision",
        "VALUE": "value",
        "LEASE": "lease",
    }
    shown: Json = {"key": clause.key, "target": clause.target, "result": clause.result}
    if clause.range_end:
        shown["range_end"] = clause.range_end
    return shown | {names.get(clause.target, clause.target.lower()): clause.value}


def _result(step: Step, answer: Answer) -> RangeResult | PutResult | DeleteResult | TxnResult:
    match step:
        case RangeRequest():
            return RangeResult([record_of(kv) for kv in answer.kvs], answer.count, answer.more)
        case PutRequest():
            return PutResult(None if answer.prev_kv is None else record_of(answer.prev_kv))
        case DeleteRequest():
            return DeleteResult([record_of(kv) for kv in answer.prev_kvs], step.prev_kv)
        case TxnRequest():
            steps = step.success if answer.succeeded else step.failure
            if len(steps) != len(answer.responses):
                raise Internal("a member answered another transaction than was asked for")
            pairs = zip(steps, answer.responses, strict=True)
            return TxnResult(answer.succeeded, [_result(one, response.inner()) for one, response in pairs])
