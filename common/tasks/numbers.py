"""Whether an answer, as a model writes it, is a number: ``same_number``.

A small grammar of its own, with exact fractions: what it does not know is no answer, because a policy learns to exploit
whatever is taken wrongly. It knows one number, with its sign, in figures of any script; groups of three (``70,000``,
``70 000``, ``70'000``), a decimal point or comma, fractions and mixed numbers (``2 1/2``, ``½``, ``\\frac{1}{2}``),
powers of ten, the words and letters that multiply (``18 thousand``, ``18k``), a currency before or after it, units
after it, and a few words before it (``The answer is``). What stands before the last ``=`` is working.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# ruff: noqa: RUF001

_LONGEST = 200
_MULTIPLIERS = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7, "k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "bn": 10**9, "B": 10**9, "tn": 10**12,
}  # fmt: skip
_MULTIPLIERS |= {f"{word}s": value for word, value in _MULTIPLIERS.items() if value > 1 and len(word) > 3}

_PLAIN = {
    # Minus signs and dashes; spaces and separators; full-width and Arabic forms of what is used below.
    **dict.fromkeys("−–—‒﹣－", "-"), **dict.fromkeys("’‘＇ʼ", "'"), **dict.fromkeys("×✕⋅·∙", "×"),
    **dict.fromkeys("⁄∕", "/"), "٫": ".", "٬": ",", "٪": "%", "º": "°",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_FRACTION = r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"
_STYLE = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed|operatorname)\s*(?=\{)"
_SPACE = r"\\(?:[ ,;:!]|quad\b|left\b|right\b|displaystyle\b)|(?<=\S)~"

_BEFORE = (
    r"(?i:(?:(?:the|final|correct|answer|result|total|sum|value|is|are|was|so|it|equals|equal|to|therefore|thus|hence)\b"
    r"[ ,:]*)*)"
)
_CURRENCY = r"(?:(?:US|A|C|NZ|HK|S)?\$|[€£¥₹₩₽₺₪₫₱฿₦]|Rs\b\.?|USD\b|EUR\b|GBP\b|INR\b|CNY\b|JPY\b)"
_SIGN = r"(?:[-+]|(?:minus|negative)\b)"
_GROUPS = (
    r"[1-9]\d{0,2}(?:(?:,\d{3})+(?:\.\d+)?|(?P<N>[ '_])\d{3}(?:(?P=N)\d{3})*(?:[.,]\d+)?)|[1-9]\d{0,2}(?:\.\d{3})+,\d+"
)
_DECIMAL = rf"(?:{_GROUPS}|\d+(?:[.,]\d+)?|\.\d+|\d+\.(?=\s*$))"
_POWER = r"(?:[eE](?P<e>[-+]?\d{1,3})\b|\s*[×*xX]\s*10\s*\^\s*(?P<ten>-?\d{1,3})\b)"
# A unit: words, joined by what joins units, each perhaps squared or cubed. A lone letter is a variable, but for those
# of metre, gram, litre, second and hour; and some words say that the number is not what is meant.
_NO_UNIT = (
    r"(?!(?:or|and|to|not|no|plus|minus|times|over|point|squared|cubed|halves|half|thirds|quarters|fourths|fifths"
    r"|tenths|hundredths|thousandths|factorial|pi|dozens?|scores?|sqrt|wrong|incorrect|false|than"
    # Multipliers not read above, other languages' too, and words that put the number in doubt.
    r"|tens|gross|grand|mega|giga|(?i:mln|mld|mrd|mio|mil|mill?e|mila|mill?iard\w*|millione?[ni]?|mill[oó]ne?s|tausend"
    r"|тыс\w*|миллион\w*|миллиард\w*|млн|млрд)"
    r"|under|below|above|negative|maybe|perhaps|probably|possibly|approximately|approx|ish|double|triple|twice)\b"
    r"|[十百千万萬億亿兆십백천만억조])"
)
_WORD = (
    rf"{_NO_UNIT}(?:[mglLsh](?!\w)|[^\W\d_]{{2,}}|(?:[A-Za-z]\.){{2,}}|[\u3040-\u9fff\uac00-\ud7af]"
    r"|[%°$€£¥₹](?:[CF]\b)?)(?:\^-?[23])?"
)
_UNIT = rf"(?:/\s*)?{_WORD}(?:[ ./×'-]+{_WORD})*"

# Each with a name of its own for the mark between its groups, which must be the same throughout.
_OVER, _UNDER, _NUMBER = (_DECIMAL.replace("<N>", f"<mark{i}>").replace("=N", f"=mark{i}") for i in range(3))

_ANSWER = re.compile(
    rf"""(?P<bar>\|)?\ *{_BEFORE}
    (?P<sign>{_SIGN})?\ *(?:{_CURRENCY}\ *)?(?P<late_sign>{_SIGN})?\ *
    (?:(?:(?P<whole>\d+)\ +)?(?P<over>{_OVER})\ */\ *(?P<under>{_UNDER})
      |(?P<number>{_NUMBER})(?:{_POWER})?
      |(?P<power_of_ten>10)\ *\^\ *(?P<exponent>-?\d{{1,3}}))
    (?(bar)\ *\|)
    (?P<scale>(?:\ *(?:{"|".join(sorted(_MULTIPLIERS, key=len, reverse=True))})\b)*)
    (?:\ *(?P<unit>{_UNIT}))?\ *\.?""",
    re.VERBOSE,
)
# What may stand before the last "=": a name, or working with numbers and signs. "2x = 18" says something else.
_NAME = re.compile(rf"{_NO_UNIT}[^\W\d_]+(?:[ _]{_NO_UNIT}[^\W\d_]+)*")
_WORKING = re.compile(r"(?:[\d\s.,+\-*/×÷^()%$€£=]|(?<=[\d\s)])[xX](?=[\d\s(])|(?<=[\d\s])[^\W\d_]{2,}(?![\w(]))+")


def same_number(reference: str, answer: str) -> bool:
    """Whether the answer is the reference number, exactly. A percentage is also its hundredth.

    Raises ``ValueError`` for a reference that is no number.
    """
    wanted, given = value_of(reference), value_of(answer)
    if wanted is None:
        raise ValueError(f"the reference answer {reference!r} is not a number")
    return given == wanted or (given is not None and _is_percentage(answer) and given / 100 == wanted)


def value_of(text: str) -> Fraction | None:
    """The one number that the text says, or None."""
    if len(text) > _LONGEST:
        return None
    plain = _plain(text)
    working, equals, value = plain.rpartition("=")
    working = working.strip()
    if equals and not (_NAME.fullmatch(working) or _WORKING.fullmatch(working)):
        return None
    match = _ANSWER.fullmatch(value.strip())
    if match is None or (match["sign"] and match["late_sign"]):
        return None
    number = _magnitude(match)
    if number is None:
        return None
    for word in re.findall(r"[^\W\d_]+", match["scale"]):
        number *= _MULTIPLIERS[word]
    sign = match["sign"] or match["late_sign"] or "+"
    return number if sign == "+" or match["bar"] else -number


def _magnitude(match: re.Match[str]) -> Fraction | None:
    if match["power_of_ten"]:
        return Fraction(10) ** int(match["exponent"])
    if match["over"]:
        over, under = _decimal(match["over"]), _decimal(match["under"])
        if under == 0:
            return None
        whole = match["whole"]
        return over / under + int(whole or 0) if whole is None or over < under else None
    return _decimal(match["number"]) * Fraction(10) ** int(match["e"] or match["ten"] or 0)


def _decimal(text: str) -> Fraction:
    """The regular expression has made sure that a comma which parts no groups of three is a decimal one."""
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    elif text.count(".") and "," in text:  # 1.234,5
        text = text.replace(".", "")
    return Fraction(re.sub(r"[ '_]", "", text).replace(",", "."))


def _is_percentage(text: str) -> bool:
    return re.search(r"\d\s*\\?%\W*$", _plain(text)) is not None


def _plain(text: str) -> str:
    """The text without LaTeX and emphasis, its characters those of the grammar."""
    letters: list[str] = []
    for letter in text:
        category = unicodedata.category(letter)
        if category == "Nd":
            letters.append(str(unicodedata.decimal(letter)))
        elif category == "Cf":  # zero-width marks
            continue
        elif category in ("Zs", "Cc"):
            letters.append(" ")
        elif "⁄" in (parts := unicodedata.normalize("NFKC", letter)):  # ½
            letters.append(f" {parts.replace('⁄', '/')} ")
        elif "\uff01" <= letter <= "\uff5e":  # full width
            letters.append(chr(ord(letter) - 0xFEE0))
        else:
            letters.append(_PLAIN.get(letter, letter))
    plain = "".join(letters)
    plain = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda power: "^" + power[0].translate(_SUPERSCRIPTS), plain)
    plain = plain.replace("{,}", ",")
    plain = re.sub(_FRACTION, lambda part: f" {part[1] or part[2]}/{part[3] or part[4]} ", plain)
    plain = re.sub(_STYLE, "", plain)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", plain)
    plain = re.sub(r"\\times|\\cdot", "×", plain)
    plain = re.sub(_SPACE, " ", plain)
    plain = re.sub(r"\\[()\[\]]", " ", plain).replace("\\%", "%").replace("$$", "$").replace("\\$", "$")
    plain = re.sub(r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1", plain).replace("{", "").replace("}", "")
    plain = " ".join(plain.split()).strip(" *_`\"'")
    while (inner := re.fullmatch(r"\$(.+)\$|\((.+)\)", plain)) and not re.search(r"[()$]", inner[1] or inner[2]):
        plain = (inner[1] or inner[2]).strip(" *_")
    return " ".join(plain.split())
