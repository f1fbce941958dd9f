"""Units of measure that decide an answer: their dimension and size. All other words after a number are only words."""

from __future__ import annotations

from fractions import Fraction

_TABLE = """
usd 1 $ dollar dollars usd buck bucks
usd 1/100 ¢ cent cents penny pennies
eur 1 € euro euros eur
gbp 1 £ pound-sterling gbp quid
gbp 1/100 pence
jpy 1 ¥ yen jpy
inr 1 ₹ rupee rupees inr
cny 1 yuan rmb cny
length 1/1000000000 nm nanometer nanometers
length 1/1000 mm millimeter millimeters millimetre millimetres
length 1/100 cm centimeter centimeters centimetre centimetres
length 1/10 dm decimeter decimeters
length 1 m meter meters metre metres
length 1000 km kilometer kilometers kilometre kilometres
length 127/5000 in inch inches
length 381/1250 ft foot feet
length 1143/1250 yd yard yards
length 201168/125 mi mile miles
mass 1/1000000 mg milligram milligrams
mass 1/1000 g gram grams
mass 1 kg kilogram kilograms
mass 1000 tonne tonnes
mass 45359237/100000000 lb lbs
time 1/1000 ms millisecond milliseconds
time 1 s sec secs second seconds
time 60 min mins minute minutes
time 3600 h hr hrs hour hours
time 86400 day days
time 604800 week weeks
volume 1/1000 ml mL milliliter milliliters millilitre millilitres
volume 1/100 cl centiliter centiliters
volume 1 l L liter liters litre litres
angle 1 degree degrees deg
angle-rad 1 rad radian radians
forenoon 1 am a.m
afternoon 1 pm p.m
celsius 1 celsius
fahrenheit 1 fahrenheit
"""

UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, size, *names in (line.split() for line in _TABLE.split("\n") if line)
    for name in names
}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3}


def unit_of(words: tuple[str, ...]) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Returns the dimensions with their powers and the size of a unit; None unless every word of it is known.

    `words` are names, "/" and "per" (the reciprocal of the next), "^2" and "^3" (of the last), "*".
    """
    if not words:
        return None
    powers: dict[str, int] = {}
    size, sign, coming, last = Fraction(1), 1, 1, None
    for word in words:
        if word in ("/", "per"):
            sign = -1
        elif word == "*":
            continue
        elif word.startswith("^") and last is not None and word[1:] in ("2", "3"):
            powers[last[0]] += last[2] * (int(word[1:]) - 1)
            size *= last[1] ** (last[2] * (int(word[1:]) - 1))
        elif word in POWERS and word not in ("squared", "cubed"):
            coming = POWERS[word]
        elif word in POWERS and last is not None:
            powers[last[0]] += last[2] * (POWERS[word] - 1)
            size *= last[1] ** (last[2] * (POWERS[word] - 1))
        else:
            known = UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 1 else None)
            if known is None:
                return None
            last = (*known, sign)
            powers[known[0]] = powers.get(known[0], 0) + sign * coming
            size *= known[1] ** (sign * coming)
            sign, coming = 1, 1
    return tuple(sorted(item for item in powers.items() if item[1])), size
