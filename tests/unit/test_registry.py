"""Names and versions of adapters: whose they are, what jobs are bound to, what is set aside."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from lorabatch import Job
from lorabatch.errors import UnknownAdapter
from lorabatch.ledger import Ledger
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.tables import adapter_faults

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


@pytest.fixture
def registry(database: sa.Engine) -> Registry:
    return Registry(database)


def entry(adapter_id: str, version: str = ONE, tenant: str = SHARED) -> Registered:
    location = f"/adapters/{version[0]}"
    return Registered(tenant, adapter_id, version, location, "base", 8, 1000, created_us=0)


def bound_to(ledger: Ledger, adapter_id: str, tenant: str = "default") -> dict[str, str]:
    """What a job that is accepted now is bound to."""
    job = Job(prompt="hi", adapter_id=adapter_id, tenant=tenant)
    ledger.accept([job])
    return dict(ledger.claim([job.job_id], "w", 60.0)[job.job_id].adapter_versions)


def test_a_job_is_bound_to_what_the_name_stands_for(registry: Registry, ledger: Ledger) -> None:
    assert registry.add(entry("a", ONE))
    before = Job(prompt="hi", adapter_id="a")
    ledger.accept([before])
    assert registry.add(entry("a", TWO))
    assert bound_to(ledger, "a") == {"a": TWO}
    claim = ledger.claim([before.job_id], "w", 60.0)[before.job_id]
    assert claim.adapter_versions == {"a": ONE}
    found = registry.find("default", "a", ONE)
    assert found is not None
    assert (found.location, found.current) == ("/adapters/1", False)
    assert [e.version for e in registry.versions(SHARED, "a")] == [TWO, ONE]


def test_what_is_not_registered_is_bound_to_nothing(registry: Registry, ledger: Ledger) -> None:
    assert bound_to(ledger, "nobody") == {}
    assert registry.find("default", "nobody") is None


def test_the_same_files_again_change_nothing(registry: Registry) -> None:
    assert registry.add(entry("a"))
    assert not registry.add(entry("a"))
    assert len(registry.versions(SHARED, "a")) == 1


def test_a_tenant_neither_sees_nor_uses_another_s(registry: Registry, ledger: Ledger) -> None:
    registry.add(entry("secret", ONE, "acme"))
    registry.add(entry("open", TWO))
    assert bound_to(ledger, "secret", "acme") == {"secret": ONE}
    assert bound_to(ledger, "secret", "umbrella") == {}
    assert registry.find("umbrella", "secret") is None
    assert registry.find("umbrella", "secret", ONE) is None
    assert [e.adapter_id for e in registry.names("umbrella")] == ["open"]
    assert [e.adapter_id for e in registry.names("acme")] == ["open", "secret"]
    assert len(registry.names()) == 2


def test_a_tenant_s_own_name_goes_before_the_shared_one(registry: Registry, ledger: Ledger) -> None:
    registry.add(entry("a", ONE))
    registry.add(entry("a", TWO, "acme"))
    assert bound_to(ledger, "a", "acme") == {"a": TWO}
    assert bound_to(ledger, "a", "umbrella") == {"a": ONE}
    assert [e.version for e in registry.names("acme")] == [TWO]
    found = registry.find("acme", "a")
    assert found is not None
    assert found.version == TWO


def test_a_removed_name_is_unknown_and_what_is_queued_still_runs(
    registry: Registry, ledger: Ledger
) -> None:
    registry.add(entry("a"))
    job = Job(prompt="hi", adapter_id="a")
    ledger.accept([job])
    assert registry.remove(SHARED, "a") == 1
    assert registry.find("default", "a") is None
    assert registry.find("default", "a", ONE) is not None
    assert bound_to(ledger, "a") == {}
    assert registry.prune() == []
    ledger.cancel([job.job_id])
    assert registry.prune([(SHARED, "b")]) == []
    assert [e.version for e in registry.prune([(SHARED, "a")])] == [ONE]
    assert registry.versions(SHARED, "a") == []


def test_what_is_not_there_cannot_be_removed_or_pinned(registry: Registry) -> None:
    registry.add(entry("a", tenant="acme"))
    for act in (lambda: registry.remove(SHARED, "a"), lambda: registry.pin(SHARED, "a", True)):
        with pytest.raises(UnknownAdapter, match="adapter 'a': not registered for everybody"):
            act()
    with pytest.raises(UnknownAdapter, match="for tenant 'umbrella'"):
        registry.remove("umbrella", "a")


def test_a_pin_is_of_the_name_and_stays_with_its_next_version(registry: Registry) -> None:
    registry.add(entry("a", ONE))
    registry.pin(SHARED, "a", True)
    registry.add(entry("a", TWO))
    assert [(e.version, e.pinned) for e in registry.versions(SHARED, "a")] == [
        (TWO, True),
        (ONE, False),
    ]
    registry.pin(SHARED, "a", False)
    assert not any(e.pinned for e in registry.names())


def test_what_failed_is_set_aside_for_longer_each_time(
    registry: Registry, database: sa.Engine
) -> None:
    registry.add(entry("a"))
    waits = []
    for failures in range(1, 9):
        for _ in range(3):  # of three jobs: one failure
            registry.set_aside((SHARED, "a", ONE), "invalid_adapter", "NaN\x00")
        found = registry.find("default", "a")
        assert found is not None
        assert found.fault is not None
        assert (found.fault.failures, found.fault.due) == (failures, False)
        with database.begin() as connection:
            row = connection.execute(sa.select(adapter_faults)).one()
            connection.execute(sa.update(adapter_faults).values(retry_us=0))
        waits.append((found.fault.retry_us - row.since_us) / 1e6)
    assert [round(wait / 60) for wait in waits] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert row.reason == "NaN\ufffd"
    found = registry.find("default", "a")
    assert found is not None
    assert found.fault is not None
    assert found.fault.due


def test_one_tenant_s_failure_is_nobody_else_s(registry: Registry) -> None:
    for tenant in (SHARED, "acme"):
        registry.add(entry("a", ONE, tenant))
    registry.set_aside(("acme", "a", ONE), "invalid_adapter", "NaN")
    faults = {e.tenant: e.fault is not None for e in registry.names()}
    assert faults == {SHARED: False, "acme": True}


def test_other_tenants_jobs_of_the_same_name_do_not_count(
    registry: Registry, ledger: Ledger
) -> None:
    for tenant, version in ((SHARED, ONE), ("acme", TWO), ("umbrella", THREE)):
        registry.add(entry("a", version, tenant))
    jobs = [Job(prompt="-", adapter_id="a", tenant=t) for t in ("x", "y", "acme", "umbrella")]
    ledger.accept(jobs)
    assert registry.remove("acme", "a") == 1
    assert registry.remove(SHARED, "a") == 2


@pytest.mark.parametrize("how", ["by hand", "by registering it again"])
def test_it_is_forgiven(how: str, registry: Registry) -> None:
    registry.add(entry("a"))
    registry.set_aside((SHARED, "a", ONE), "invalid_adapter", "NaN")
    if how == "by hand":
        registry.forgive((SHARED, "a", ONE))
    else:
        registry.add(entry("a"))
    found = registry.find("default", "a")
    assert found is not None
    assert found.fault is None


def test_many_may_register_at_once(registry: Registry) -> None:
    barrier = threading.Barrier(8)
    failed = []

    def add(n: int) -> None:
        barrier.wait()
        try:
            for version in (ONE, TWO, THREE):
                registry.add(entry(f"a{n % 2}", version))
                registry.set_aside((SHARED, f"a{n % 2}", version), "code", "reason")
        except Exception as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(registry.versions(SHARED, "a0")) == len(registry.versions(SHARED, "a1")) == 3
