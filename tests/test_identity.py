import json
import re
from collections import deque
from datetime import date
from functools import partial
from operator import itemgetter

import numpy as np
import pytest
import torch
from torch import nn

from skdim import DIMTransformer
from skdim.identity import describe, describe_images
from skdim.images import check_images


class Crop:
    def __init__(self, size, layer=None):
        self.size, self.layer = size, layer


def test_equal_parameters_have_equal_descriptions_and_others_others():
    def values():
        torch.manual_seed(0)
        layer = nn.Linear(2, 2).bfloat16()
        return [
            *(None, "a", 2, np.float32(0.5), (1, 2), {"size": 2}, {"size": 3}, Crop, Crop(2), Crop(3), len),
            *({2, 3, 5}, frozenset({2, 3}), b"a", range(3), range(4), torch.float32, torch.bfloat16),
            *(lambda x: x + 1, lambda x: x + 2, lambda x: lambda: x + 3, lambda x: lambda: x + 4),
            *(layer, Crop(2, layer), nn.Sequential(layer, nn.Dropout(0.2)), nn.Sequential(layer, nn.Dropout(0.3))),
        ]

    torch_state = torch.get_rng_state()
    first, again = (json.dumps([describe(value) for value in values()]) for _ in range(2))
    torch.set_rng_state(torch_state)
    assert first == again
    descriptions = [json.dumps(each) for each in json.loads(first)]
    assert len(set(descriptions)) == len(descriptions)


class Slotted:
    __slots__ = ("strength",)

    def __init__(self, strength):
        self.strength = strength


def with_default(strength):
    def augment(images, generator, strength=strength):
        return strength * images

    return augment


def with_keyword(strength):
    def augment(images, generator, *, strength=strength):
        return strength * images

    return augment


@pytest.mark.parametrize(
    "make",
    [
        with_default,
        with_keyword,
        Slotted,
        lambda strength: partial(with_default, strength=strength),
        lambda strength: np.array([strength / 3, "a"], dtype=object),
        # Without attributes that Python would show.
        itemgetter,
        np.random.RandomState,
        np.random.default_rng,
        lambda strength: re.compile("a" * strength),
        lambda strength: deque([strength]),
        lambda strength: date(2020, 1, strength),
        lambda strength: torch.tensor([2**40 + strength]),
        lambda strength: torch.tensor([1 + 1j * strength]).conj(),
        lambda strength: torch.tensor(float(strength), dtype=torch.bfloat16),
        lambda strength: [float("nan"), float("inf"), strength],
        lambda strength: [Crop.__init__.__get__, strength],
    ],
)
def test_descriptions_tell_parameters_apart_by_all_that_they_hold(make):
    first, again, other = (json.dumps(describe(make(strength)), allow_nan=False) for strength in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_function_over_a_variable_that_is_not_set_yet_is_described():
    def outer():
        def augment(images, generator):
            return images * later

        first = describe(augment)
        later = 2
        return first, describe(augment), later

    first, then, _ = outer()
    assert first != then


def test_the_same_numbers_in_images_of_another_shape_are_other_images():
    X = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    options = {"image_shape": None, "data_format": "channels_first", "reset": True}
    tall, flat = (
        describe_images(check_images(DIMTransformer(), images, **options)) for images in (X, X.reshape(6, 1, 4, 16))
    )
    assert tall != flat


class Tempered(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.layer = nn.Identity()
        self.temperature = temperature


def test_modules_are_told_apart_by_attributes_that_their_repr_does_not_show():
    assert describe(Tempered(1.0)) == describe(Tempered(1.0)) != describe(Tempered(2.0))
