from glmq.checkpoint.names import natural_key


def test_natural_order_compares_numbers_as_numbers() -> None:
    names = ["b", "a10", "a9", "a09", "a", "a9.x10", "a9.x9", "a" + "1" * 5000, "a" + "2" * 5000]
    expected = ["a", "a09", "a9", "a9.x9", "a9.x10", "a10", "a" + "1" * 5000, "a" + "2" * 5000, "b"]
    assert sorted(names, key=natural_key) == expected


def test_digits_of_other_scripts_are_letters() -> None:
    assert sorted(["a2", "a\u00b2", "a10", "a\u0663"], key=natural_key) == ["a2", "a10", "a\u00b2", "a\u0663"]
