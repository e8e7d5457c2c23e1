"""Every policy that can be configured keeps the contract."""

from __future__ import annotations

from typing import get_args

import pytest

from contracts.policy import PolicyContract
from kvstrata import config
from kvstrata.policies import POLICIES


@pytest.mark.parametrize("name", sorted(POLICIES))
class TestEveryPolicy(PolicyContract):
    pass


def test_the_configuration_knows_every_policy() -> None:
    assert sorted(get_args(config.Policy)) == sorted(POLICIES)


def test_policies_carry_their_names() -> None:
    assert {name: policy.name for name, policy in POLICIES.items()} == {name: name for name in POLICIES}
