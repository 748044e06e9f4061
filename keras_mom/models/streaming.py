"""Text out of tokens that come one by one."""

# A character of UTF-8 has up to four bytes, each of which may be a token.
_LONGEST_CHARACTER = 4
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text as they come, whole characters at a time.

    A token is decoded behind those of the piece of text before it, on which its text
    may depend (a space in front of a word, for example).

    Args:
        decode: function from a list of token ids to their text.
    """

    def __init__(self, decode):
        self._decode = decode
        self._context = []
        self._pending = []

    def push(self, token_id):
        """The text that a token completes, which may be empty."""
        self._pending.append(int(token_id))
        text = self._new_text()
        unfinished = text.endswith(_REPLACEMENT)
        if not text or (unfinished and len(self._pending) < _LONGEST_CHARACTER):
            # Nothing yet, or half a character.
            self._drop_silent(text)
            return ""
        self._context, self._pending = self._pending, []
        return text

    def close(self):
        """The rest of the text."""
        text = self._new_text() if self._pending else ""
        self._pending = []
        return text

    def _new_text(self):
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _drop_silent(self, text):
        # Special tokens have no text; a row of them must not be kept for ever.
        if not text and len(self._pending) > _LONGEST_CHARACTER:
            self._pending.pop(0)
