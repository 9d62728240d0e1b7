r"""Know the units that may follow a number without changing its value.

The list is closed. A word that is not in it is no unit: `maybe` and `incorrect` hedge or deny, and `hundredths`,
`halves`, `dozen`, `pairs`, `times`, `squared` and `negative` change the value. Apart from measures it has the things
that the questions of GSM8K and of the word problems count most often ("How many apples ..."): a verifier does not see
the question, and each of them leaves the number as it is. A reference may bring any other noun: `9 (zorks)`.
"""

import re

_KINDS = {  # one unit an entry, under all its names; plurals are made from them
    "money": "dollar usd buck|cent ¢|euro eur €|sterling gbp £|yen jpy ¥|rupee|peso",
    "time": "millisecond ms|second sec secs s|minute min mins|hour hr hrs h|day|week wk|month|year yr yrs|"
    "decade|century centuries",
    "length": "mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|m meter metre|"
    "km kilometer kilometre|in inch|ft foot feet|yd yard|mi mile|unit",
    "volume": "ml milliliter millilitre|l L liter litre|gallon gal|quart qt|pint pt|cup|tablespoon tbsp|"
    "teaspoon tsp|barrel",
    "area": "acre|hectare ha",
    "mass": "mg milligram|g gram|kg kilogram kilo|lb lbs pound|oz ounce|ton tonne",
    "angle": "degree deg|radian rad",
    "other": "calorie kcal|watt kW|volt|joule J|newton N|hertz Hz|byte|bit|point|percentage",
    "people": "person people persons|student|child children|kid|boy|girl|man men|woman women|friend|"
    "customer|passenger|player|employee|worker|guest|member|adult|teacher|parent|voter|vote|"
    "family families|camper|grandchild grandchildren",
    "animals": "animal|bird|fish fishes|cat|dog|cow|chicken|duck|goat|sheep|horse|puppy puppies|kitten|"
    "frog|turtle|rabbit|insect|bug|bee|ant|goose geese|lion|shark|pet|egg|leg|fly flies",
    "food": "apple|orange|banana|lemon|pear|peach|plum|cherry cherries|berry berries|"
    "strawberry strawberries|watermelon|grape|fruit|vegetable|carrot|potato potatoes|"
    "tomato tomatoes|onion|cookie|cake|cupcake|pie|brownie|muffin|donut|doughnut|pizza|"
    "sandwich|hamburger|hotdog|cracker|candy candies|chocolate|lollipop|gumball|jellybean|"
    "peanut|nut|pancake|biscuit|meal|slice|scoop|serving|loaf loaves|soda|dish|seed",
    "things": "book|page|chapter|magazine|newspaper|notebook|word|letter|song|movie|picture|photo|"
    "painting|poster|game|toy|doll|ball|balloon|marble|block|bead|button|card|sticker|stamp|"
    "coin|ticket|pencil|pen|crayon|marker|eraser|folder|file|envelope|sheet|paper|gift|"
    "present|shirt|sock|shoe|towel|dress|coat|necklace|bracelet|flower|rose|tree|plant|"
    "petal|leaf leaves|bouquet|vase|seashell|shell|rock|stone|stick|log|brick|tile|nail|"
    "candle|bottle|can|jar|glass|plate|box|bag|basket|car|bus|truck|van|bike|bicycle|boat|"
    "wheel|tire|seat|chair|table|shelf shelves|room|house|home|floor|window|computer|machine|"
    "phone|star|piece|item|object|thing",
    "counts": "way|problem|question|lap|trip|ride|step|goal|hit|round|episode|lesson|class|night|"
    "color|colour|side|edge|vertex vertices|face|diagonal|triangle|square|cube|digit|integer|"
    "number|solution|value|outcome|combination|permutation|arrangement|subset|function|sequence|"
    "row|column",
}  # fmt: skip
_words = str.split
_SHORT = {*_words("mm cm dm m km in ft yd mi ml l L g kg mg lb lbs oz s h hr min ms sec ha usd eur gbp jpy kW J N Hz")}
_NO_UNITS = {  # words that change the value before them, or deny it; a reference cannot bring them as units either
    *_words(
        "not no none base plus minus negative positive times over choose squared cubed factorial root half halves "
        "halved third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh eighth eighths "
        "ninth tenth tenths hundredth hundredths thousandth thousandths millionth millionths dozen dozens score "
        "gross pair pairs couple couples hundred hundreds thousand thousands million millions billion billions "
        "trillion trillions double doubled twice triple tripled more less fewer about approximately roughly around "
        "almost nearly maybe perhaps possibly probably false wrong incorrect true right correct per mod to from of "
        "the or and between"
    ),
}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}


def _plural(word: str) -> str:
    return word + ("es" if re.search("(?:s|x|z|ch|sh)$", word) else "s")


_NAMES = {
    name: entry.split()[0]
    for kind in _KINDS.values()
    for entry in kind.split("|")
    for word in entry.split()
    for name in (word, *(() if word in _SHORT or len(word) < 2 else (_plural(word),)))
}
_POWERED = {entry.split()[0] for entry in _KINDS["length"].split("|")} | {"s", "second"}
_ONE = r"(?:(square|sq|cubic|cu)\.? )?([A-Za-z¢€£¥]+)\.?(?:\^\{?([23])\}?| (squared|cubed))?"
_UNIT = re.compile(rf"{_ONE}(?: ?(?:per |/) ?{_ONE})?|(?:per |/){_ONE}")
_TAIL = re.compile(
    r"(?:\\text\{([^{}]*)\}|\(([A-Za-z ]{3,})\)|\(\\text\{([^{}]*)\}\)"
    r"|(?<![\\A-Za-z])((?:/|(?:[Ss]quare|[Ss]q\.?|[Cc]ubic|[Cc]u\.?) ?)?(?:[A-Za-z¢]{2,}|[a-z](?=/))"
    r"(?: [A-Za-z]+|/[A-Za-z]+){0,3}|[¢€£¥]))"
    r"(\^\{?[23]\}?)?$"
)


def unit(text: str) -> str | None:
    """Return one name for a unit of the list: "m^2" for `square meters`, "mi/h" for `mph`; None for other words."""
    text = re.sub(r"^(?:US|U\.S\.) |(?<=year|ears) old$", "", text.strip())
    text = {"mph": "mile per hour", "kph": "kilometer per hour"}.get(text.lower(), text)
    if scale := re.fullmatch("degrees? ([Cc]elsius|[Ff]ahrenheit)", text):
        return f"degree {scale[1][0].upper()}"
    match = _UNIT.fullmatch(re.sub(r"(?i)\b(square|sq|cubic|cu)\b", lambda found: found[0].lower(), text))
    if match is None:
        return None
    over, under = _one(*match.groups()[:4]), _one(*match.groups()[4:8]) or _one(*match.groups()[8:])
    if (over is None and match[2]) or (under is None and (match[6] or match[10])):
        return None
    return (over or "") + (f"/{under}" if under else "")


def _one(before: str | None, word: str | None, power: str | None, after: str | None) -> str | None:
    """Return the name of a unit without a fraction, or None if it is not in the list or cannot have a power."""
    if word is None:
        return None
    name = _NAMES.get(word) if len(word) == 1 else _NAMES.get(word) or _NAMES.get(word.lower())
    powers = [_POWERS.get(before or ""), power and f"^{power}", {"squared": "^2", "cubed": "^3"}.get(after or "")]
    given = [each for each in powers if each]
    if name is None or len(given) > 1 or (given and name not in _POWERED):
        return None
    return name + "".join(given)


def measure(text: str) -> tuple[str, str]:
    """Split a text into a value and its unit.

    Args:
        text: as `bae.text.spelling.canonical` returns it.

    Returns:
        The value, and the name of the unit: "" if there is none, with a "?" before it if it is not in the list. One
        letter is a unit inside \\text only, since it may be a variable elsewhere.
    """
    text = re.sub(r" ?per cent$|\\text\{ ?per cent ?\}$", "%", re.sub(r"(?<=[0-9])\\sec$", "sec", text))
    if temperature := re.search(r"\^\\circ ?(?:\\text\{ ?([CF]) ?\}|([CF]))$", text):
        return text[: temperature.start()], f"degree {temperature[1] or temperature[2]}"
    for sign, name in (("%", "%"), (r"^\circ", "degree"), ("$", "dollar")):
        if text.endswith(sign):
            return text.removesuffix(sign), name
    if money := re.fullmatch(r"([+-]?)([$€£])([0-9.\\].*)", re.sub("^USD ?", "$", text)):
        name = {"$": "dollar", "€": "euro", "£": "sterling"}[money[2]]
        value, after = measure(money[1] + money[3])
        return (value, name) if after in ("", name) else (value, f"{name}{after}") if after[0] == "/" else (text, "")
    if not (match := _TAIL.search(text)):
        return text, ""
    inside, power = str(next(group for group in match.groups()[:4] if group is not None)), match[5] or ""
    value = text[: match.start()].strip()
    inside = re.sub(r"^(sq|cu)\.(?=[a-z])", r"\1 ", inside.strip("() "))
    scale, _, rest = inside.partition(" ")
    if rest and scale.lower() in ("hundred", "thousand", "million", "billion", "trillion", "dozen"):
        value, inside = value + scale.lower(), rest  # `5 million dollars`
    if (known := unit(inside + power)) is not None:
        return value, known
    nouns = re.fullmatch(r"[A-Za-z]{3,}(?:[ -][A-Za-z]{3,})?", inside)
    if not nouns or power or not _NO_UNITS.isdisjoint(re.split("[ -]", inside.lower())):
        return text, ""
    if match[4] and not re.search("[0-9]$", value):  # letters after an expression are its variables
        return text, ""
    return value, f"?{_singular(inside.lower())}"


def _singular(noun: str) -> str:
    return re.sub("ies$", "y", noun) if noun.endswith("ies") else re.sub("(?<=[sxzh])es$|(?<!s)s$", "", noun)


def same_unit(given: str, wanted: str) -> bool:
    """Tell whether a unit may stand where `wanted` is the reference's, both as `measure` names them; "" is none."""
    return given == wanted or not given or (not wanted and not given.startswith("?"))
