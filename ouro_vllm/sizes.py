"""Row counts of matrix products, rounded up where every new one has to be compiled first.

oneDNN, behind vLLM's linear layers on the CPU, makes code for each shape and row count when it first meets it: 0.5 to
1 ms each, of which a pass has four shapes and a readout one. Plain decoding has the same rows step after step; where
rows come and go, new counts would cost more than what they are for. On GPUs vLLM's graphs have sizes of their own, and
without graphs nothing is compiled.
"""


def rounded(rows: int, device: str) -> int:
    """Rows to compute for `rows` of use, on a device of this type: less than a sixteenth more, few different counts.

    1 to 32, then even numbers to 64, multiples of 4 to 128 and so on.
    """
    if device != "cpu":
        return rows
    step = max(1, (1 << max(0, rows - 1).bit_length()) // 32)
    return -(-rows // step) * step


def compiled(most: int, device: str) -> list[int]:
    """What `rounded` makes of up to `most` rows, where each is compiled by itself; nothing elsewhere."""
    return sorted({rounded(rows, device) for rows in range(1, most + 1)}) if device == "cpu" else []
