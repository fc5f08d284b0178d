"""Row counts that are compiled one by one."""

from ouro_vllm.sizes import rounded


def test_few_counts_and_little_beyond_what_is_asked_for():
    sizes = [rounded(rows, "cpu") for rows in range(1, 4097)]
    assert sizes[:32] == list(range(1, 33)) and sizes == sorted(sizes)
    for rows, size in enumerate(sizes, start=1):
        assert rows <= size < rows * 17 / 16 and rounded(size, "cpu") == size
    assert len(set(sizes[:128])) == 64 and len(set(sizes)) == 32 + 16 * 7


def test_graphs_have_sizes_of_their_own():
    assert [rounded(rows, "cuda") for rows in (1, 33, 1000)] == [1, 33, 1000]
