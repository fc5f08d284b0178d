"""The text of single tokens, in the context of those before: what is committed, and what may follow. Pure Python."""

from collections.abc import Callable, Sequence

CONTEXT = 8  # tokens of the prompt that the first token's text may depend on
HALF = "\ufffd"  # what decoding makes of a character that is not complete


class Pieces:
    """Decodes token by token, as vLLM's incremental detokenizers do (vllm/tokenizers/detokenizer_utils.py).

    decode: token ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        """context: the tokens before the first."""
        self.decode = decode
        self.ids, self.read = list(context[-CONTEXT:]), len(context[-CONTEXT:])
        self.before = decode(self.ids)

    def push(self, token: int) -> str:
        """The text that `token` adds; none while a character is not complete."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(HALF) or len(text) <= len(self.before):
            return ""
        piece = text[len(self.before) :]
        self.ids = self.ids[self.read :]
        self.read, self.before = len(self.ids), self.decode(self.ids)
        return piece

    def peek(self, tokens: Sequence[int]) -> list[str]:
        """The texts that `tokens` would add one after the other."""
        copy = Pieces.__new__(Pieces)
        copy.decode, copy.ids, copy.read, copy.before = self.decode, list(self.ids), self.read, self.before
        return [copy.push(token) for token in tokens]


class Text:
    """A text that somebody else sends in parts, told apart into its tokens.

    held: text of its tokens that was not sent yet.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        """See `Pieces`."""
        self.pieces, self.held = Pieces(decode, context), ""

    def take(self, tokens: Sequence[int], sent: str) -> list[str]:
        """`sent`, in a piece per new token."""
        pieces = [self.pieces.push(token) for token in tokens]
        self.held += "".join(pieces)
        parts = cut(sent, [self.held[: len(self.held) - sum(map(len, pieces[1:]))], *pieces[1:]] if pieces else [])
        self.held = self.held[len(sent) :]
        return parts

    def ahead(self, tokens: Sequence[int]) -> list[str]:
        """A piece per token that may follow, the first with what is held."""
        pieces = self.pieces.peek(tokens)
        if pieces:
            pieces[0] = self.held + pieces[0]
        return pieces


def cut(text: str, pieces: Sequence[str]) -> list[str]:
    """`text` in as many parts as there are pieces, of their lengths as far as it reaches; the last takes the rest."""
    if not pieces:
        return []
    parts, start = [], 0
    for piece in pieces[:-1]:
        parts.append(text[start : start + len(piece)])
        start += len(piece)
    return [*parts, text[start:]]
