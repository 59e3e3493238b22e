"""From Unicode's names of emoji to captions that a person might write.

The Common Locale Data Repository (CLDR) gives every emoji a short label: "fox", "woman: red hair",
"no smoking", "eight o’clock". This module works in three steps:

1. `is_depictable` decides which emoji can become a picture with a caption.
2. `phrase` and `noun_phrase` turn the label into a noun phrase: "a woman with red hair", "a no smoking sign".
3. `captions` turns the noun phrase into captions.

An emoji is identified by its codepoints in lower-case hexadecimal, joined by dashes, without the presentation
selector FE0F: "1f98a", "1f469-1f3fd-200d-1f692".
"""

from __future__ import annotations

import hashlib
import re

SKIN_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
_ZWJ, _FEMALE, _MALE = "200d", "2640", "2642"

# Gendered codepoints -> the neutral one. It shows which emoji depict the same thing.
_NEUTRAL = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman -> person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl -> child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman -> older person
    "1f57a": "1f483",  # man dancing -> woman dancing (there is no neutral one)
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess -> person with crown
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, man -> person
    "1f46c": "1f46b", "1f46d": "1f46b",  # men, women holding hands -> woman and man holding hands
}  # fmt: skip
_NEUTRAL_GROUPS = {  # whole sequences that single codepoints do not reach
    "1f9d1-200d-1f384": "1f385", "1f936": "1f385",  # Mx and Mrs Claus -> Santa Claus
    "1f9d1-200d-1f91d-200d-1f9d1": "1f46b",  # people holding hands
}  # fmt: skip


def normalise(codepoints: str) -> str:
    """Codepoints in lower case, without leading zeros and without FE0F: "0031-FE0F-20E3" -> "31-20e3"."""
    parts = [part.lstrip("0") for part in codepoints.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def split_tone(codepoints: str) -> tuple[str, list[str]]:
    """(codepoints without skin-tone modifiers, the modifiers in order)."""
    parts = codepoints.split("-")
    return "-".join(part for part in parts if part not in SKIN_TONES), [
        part for part in parts if part in SKIN_TONES
    ]


def group_of(codepoints: str) -> str:
    """What an emoji shows, without skin tone, gender and direction: the codepoints of the neutral variant.

    "1f469-1f3fd-200d-1f692" (woman firefighter: medium skin tone) and "1f468-200d-1f692" (man firefighter)
    both give "1f9d1-200d-1f692".
    """
    base, _ = split_tone(codepoints)
    parts = [_NEUTRAL.get(part, part) for part in base.split("-")]
    while (
        len(parts) > 2 and parts[-2] == _ZWJ and parts[-1] in (_FEMALE, _MALE, "27a1")
    ):  # 27a1: facing right
        parts = parts[:-2]
    group = "-".join(parts)
    return _NEUTRAL_GROUPS.get(group, group)


# ------------------------------------------------------------------------------------------------------------
# Which emoji
# ------------------------------------------------------------------------------------------------------------
_TEXT_LIKE = re.compile(
    r"^(keycap|flag:|input |japanese “)"  # digits, country flags, letters, ideographs
    r"|^(a|ab|b|o) button \(blood type\)$"
    r"|^(cl|cool|free|id|new|ng|ok|p|sos|up!|vs) button$"
    r"|^(back|end|on!|soon|top) arrow$"
    r"|^(atm sign|water closet|circled m|information|copyright|registered|trade mark|zzz)$"
)
_MULTIPLE = re.compile(r"^(family|kiss|couple with heart): ")
_COUPLE = re.compile(r"(holding hands|wrestling|bunny ears|handshake|^kiss$|^couple with heart$)")
_COMPONENT = re.compile(r"^((red|curly|white) hair|bald)$")


def is_depictable(codepoints: str, label: str) -> bool:
    """Whether the emoji is kept. `label` is the CLDR name of the emoji without its skin tone.

    These are dropped:

    - letters, digits, keycaps, ideographs, and signs that are words;
    - flags of countries and regions;
    - families, couples and kisses whose label lists genders;
    - emoji with several people and a skin tone;
    - turned variants ("facing right") with a skin tone;
    - hair without a person.
    """
    base, tones = split_tone(codepoints)
    label = label.lower()
    if not base or _TEXT_LIKE.search(label) or _MULTIPLE.search(label) or _COMPONENT.search(label):
        return False
    return not tones or (len(tones) == 1 and not _COUPLE.search(label) and "facing right" not in label)


# ------------------------------------------------------------------------------------------------------------
# Noun phrases
# ------------------------------------------------------------------------------------------------------------
_ZODIAC = (
    "aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus"
).split()
_SIGNS = (
    "baggage claim", "biohazard", "children crossing", "construction", "currency exchange", "customs",
    "high voltage", "left luggage", "men's room", "mobile phone off", "non-potable water", "passport control",
    "place of worship", "potable water", "prohibited", "radioactive", "restroom", "vibration mode", "warning",
    "women's room",
)  # fmt: skip
_SYMBOLS = ("dizzy", "infinity", "khanda", "om", "wireless")
_RENAMED = {
    "breast-feeding": "breast-feeding woman",
    "divide": "division sign",
    "foggy": "foggy city",
    "index pointing at the viewer": "index finger pointing at the viewer",
    "index pointing up": "index finger pointing up",
    "locked": "locked padlock",
    "locked with key": "locked padlock with key",
    "locked with pen": "locked padlock with pen",
    "minus": "minus sign",
    "multiply": "multiplication sign",
    "plus": "plus sign",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "unlocked": "unlocked padlock",
}
# Uncountable things, activities, proper names and phrases: they take no article.
_NO_ARTICLE = set(
    (
        "bacon|badminton|baguette bread|bowling|bread|broccoli|bubble tea|building construction|butter|"
        "camping|candy|canned food|cooked rice|cooking|coral|curry rice|custard|dashing away|dna|"
        "field hockey|fire|flatbread|fog|fondue|garlic|ginger root|horse racing|ice|ice cream|ice hockey|"
        "lacrosse|luggage|mate|meat on bone|money with wings|mount fuji|mrs. claus|mx claus|nail polish|oden|"
        "ping pong|popcorn|pouring liquid|sake|salt|santa claus|shaved ice|soap|soft ice cream|spaghetti|"
        "stuffed flatbread|sushi|tennis|thread|thumbs down|thumbs up|tokyo tower|wood|yarn"
    ).split("|")
)
_DEFINITE = {"kaaba", "milky way", "statue of liberty"}
_PREPOSITION = re.compile(
    r" (with|without|of|on|in|at|from|behind|over|showing|holding|lifting|hugging|wrestling|up)\b"
)
_SINGULAR = re.compile(r"(ss|us|is|os|crossbones)$")
_PLURALS = {"skis", "men", "women", "people"}
_AN = re.compile(r"^([aeiou]|hour|herb\b|x-ray|8)")
_A = re.compile(r"^(uni|uti|euro|ewe|one\b|once\b)")


def phrase(label: str) -> str:
    """A CLDR name without skin tone as a plain phrase in lower case, without its article.

    "man: beard" -> "man with a beard", "Aries" -> "aries zodiac sign", "no smoking" -> "no smoking sign",
    "eight o’clock" -> "clock face showing eight o'clock".
    """
    text = label.lower().replace("’", "'").replace("“", "").replace("”", "")
    if match := re.fullmatch(r"(\w+): (bald|beard|\w+ hair)", text):
        who, what = match.groups()
        return f"bald {who}" if what == "bald" else f"{who} with {'a beard' if what == 'beard' else what}"
    if match := re.fullmatch(r"(.*): facing right", text):
        return f"{match[1]} facing right"
    if re.fullmatch(r"\w+( o'clock|-thirty)", text):
        return f"clock face showing {text}"
    if text in _ZODIAC:
        return f"{text} zodiac sign"
    if text in _SIGNS or text.startswith("no "):
        return f"{text} sign"
    if text in _SYMBOLS:
        return f"{text} symbol"
    return _RENAMED.get(text, text)


def indefinite(text: str) -> str:
    """`text` behind its indefinite article: "a fox", "an owl", "a unicorn", "an hourglass"."""
    return f"an {text}" if _AN.match(text) and not _A.match(text) else f"a {text}"


def is_plural(text: str) -> bool:
    """Whether the head noun of a phrase is a plural: in "crossed swords", not in "face with rolling eyes"."""
    head = _PREPOSITION.split(text)[0].split()[-1]
    return head in _PLURALS or (head.endswith("s") and not _SINGULAR.search(head))


def with_tone(text: str, tone: str | None) -> str:
    """The phrase with a skin tone: "woman with dark skin tone", "woman with veil and dark skin tone"."""
    if tone is None:
        return text
    return f"{text} {'and' if ' with ' in text else 'with'} {SKIN_TONES[tone]}"


def noun_phrase(text: str, tone: str | None = None) -> str:
    """The phrase with skin tone and article; plurals, uncountable things and names take no article."""
    full = with_tone(text, tone)
    if text in _DEFINITE:
        return f"the {full}"
    return full if text in _NO_ARTICLE or is_plural(text) else indefinite(full)


# ------------------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------------------
MAX_KEYWORDS = 6
_UNWANTED = {
    "ass",
    "gun",
    "handgun",
    "pistol",
    "revolver",
    "sexy",
    "sucks",
    "weapon",
}  # crude, or wrong for a water pistol


def stable_hash(*parts: str) -> int:
    """A 64-bit integer from the sha256 of the parts: the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode("utf-8")).digest()[:8], "big")


def pick_keywords(words: list[str], text: str) -> list[str]:
    """At most six of CLDR's keywords, chosen by a stable hash among those that add to the phrase `text`."""
    in_phrase = set(re.split(r"[\s-]+", text))
    plain = [word.lower().replace("’", "'").replace("“", "").replace("”", "") for word in words]
    new = [
        word
        for word in dict.fromkeys(plain)
        if not set(re.split(r"[\s-]+", word)) <= in_phrase
        and word not in _UNWANTED
        and "skin tone" not in word
        and re.fullmatch(r"[^\W_][\w' -]+", word)
    ]
    return sorted(sorted(new, key=lambda word: stable_hash("keyword", text, word))[:MAX_KEYWORDS])


def captions(text: str, tone: str | None, style: str, keywords: list[str]) -> list[str]:
    """Four to six captions for one image; the first is the canonical one: "a 3d emoji of a fox".

    `text` is a phrase without article, `tone` a skin-tone codepoint or None, `style` the word for the style,
    and `keywords` the result of `pick_keywords`. The last caption does not name the style.
    """
    full, thing = with_tone(text, tone), noun_phrase(text, tone)
    short = len(full.split()) <= 3 and " with " not in full and not is_plural(text)
    result = [
        f"a {style} emoji of {thing}",
        f"{indefinite(full)} emoji in {style} style" if short else f"an emoji of {thing} in {style} style",
        f"{style} {full}",
    ]
    if keywords:
        words = sorted(keywords, key=lambda word: stable_hash("caption", style, full, word))
        result.append(f"a {style} emoji of {thing}, {words[0]}")
        if len(words) > 2:
            result.append(f"a {style} emoji of {thing}: {words[1]}, {words[2]}")
    result.append(f"an emoji of {thing}")
    return result
