"""Tokens that look like English verbs in the past tense, by their text alone (section 3.3.1 took 1,500 of these).

No tagger is needed, at a price: adjectives in -ed count ("tired"), and so do a few nouns that are spelled like a verb
("felt", "left"). Verbs of several tokens count by their first one only where that is a word of the list.
"""

from __future__ import annotations

_IRREGULAR = (
    "ate beat became began bent bit blew bought broke brought built burnt came caught chose cost crept cut dealt "
    "drank drew drove fed fell felt fled flew forgot fought found froze gave got grew had heard held hid hit hung "
    "hurt kept knew laid lay led left lent lit lost made meant met paid put ran rang read rode rose said sang sank "
    "sat saw sent set shook shone shot shut slept slid sold sought spent spoke sprang spread stole stood struck "
    "stuck swam swept swore swung taught thought threw told took tore understood was went were woke won wore wrote"
)
_NO_VERBS = (
    "bed bleed breed creed deed embed exceed feed greed hundred indeed need proceed red reed sacred "
    "seed shed shred sled speed steed succeed weed wicked naked kindred hatred"
)
IRREGULAR, NO_VERBS = frozenset(_IRREGULAR.split()), frozenset(_NO_VERBS.split())
SHORTEST = 4
"""Letters of a word in -ed."""


def verb_like(text: str) -> bool:
    """Whether a token, with the space before it, is a lower-case word in -ed or an irregular past form."""
    word = text.strip()
    if text[:1] != " " or not word.isalpha() or word != word.lower():
        return False
    return word in IRREGULAR or (len(word) >= SHORTEST and word.endswith("ed") and word not in NO_VERBS)
