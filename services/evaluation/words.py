"""English word lists that the support check reads text with, and the form under which words are compared."""

import functools
import unicodedata

from nltk.stem.porter import PorterStemmer


def _words(text: str) -> list[str]:
    return text.split()


STOP_WORDS = frozenset(
    _words("""
    a about above across after again against ago all almost along already also although always am among an and
    another any anyone anything are aren't around as at away back be became because become becomes been before
    behind being below beside besides between beyond both but by came can can't cannot come could couldn't despite
    did didn't do does doesn't doing don't done down during each either else enough especially etc even ever every
    everyone everything except few for from further gave get gets getting give given go goes going gone got had
    hadn't has hasn't have haven't having he he'd he'll he's hence her here hers herself him himself his how however
    i i'd i'll i'm i've if in including indeed inside instead into is isn't it it'd it'll it's its itself just keep
    kept later least less let let's like likely made mainly make makes making many may maybe me meanwhile might mine
    more moreover most mostly much must my myself near nearly neither never nevertheless no nobody none nor not
    nothing now of off often old on once one ones only onto or other others otherwise our ours ourselves out outside
    over own per perhaps put quite rather really said same saw say saying says see seen several shall she she'd
    she'll she's should shouldn't since so some someone something sometimes soon still such take taken takes taking
    than that that's the their theirs them themselves then there there's therefore these they they'd they'll they're
    they've thing things this those though through throughout thus till to together told too took toward towards
    under unless until up upon us use used using various very via was wasn't way we we'd we'll we're we've well went
    were weren't what what's whatever when where whereas whether which while who who's whoever whole whom whose why
    will with within without won't would wouldn't yes yet you you'd you'll you're you've your yours yourself
    yourselves
    """)
)

SELF_REFERENCE = frozenset(
    _words("""
    article articles author authors summary summaries summarise summarises summarize summarizes text passage paragraph
    discuss discusses discussed describe describes described highlight highlights highlighted mention mentions mentioned
    according report reports reported piece
    """)
)
"""Words by which a summary speaks of its article rather than of the article's facts."""

NAME_LINKS = frozenset({"al", "bin", "da", "de", "del", "der", "di", "du", "of", "la", "le", "the", "van", "von"})
"""Lower-case words that names contain."""

TITLES = frozenset({"dr", "gen", "lt", "mr", "mrs", "ms", "prof", "rev", "sgt", "sir", "st"})

UNITS = {
    word: value
    for value, word in enumerate(
        _words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen""")
    )
}
TENS = {
    word: 10 * value
    for value, word in enumerate(_words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)
}
ORDINALS = {
    word: value
    for value, word in enumerate(
        _words("""first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
        fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"""),
        start=1,
    )
} | {
    word: 10 * value
    for value, word in enumerate(
        ["twentieth", "thirtieth", "fortieth", "fiftieth", "sixtieth", "seventieth", "eightieth", "ninetieth"], start=2
    )
}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SHORT_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "bn": 10**9, "tn": 10**12} | SCALES

_IRREGULAR = {
    form: base
    for base, forms in {
        "be": "was were been",
        "begin": "began begun",
        "blow": "blew blown",
        "break": "broke broken",
        "bring": "brought",
        "build": "built",
        "buy": "bought",
        "catch": "caught",
        "child": "children",
        "choose": "chose chosen",
        "die": "dead death deaths dying",
        "draw": "drew drawn",
        "drive": "drove driven",
        "eat": "ate eaten",
        "fall": "fell fallen",
        "feel": "felt",
        "fight": "fought",
        "find": "found",
        "flee": "fled",
        "fly": "flew flown",
        "foot": "feet",
        "freeze": "froze frozen",
        "grow": "grew grown growth",
        "hear": "heard",
        "hide": "hid hidden",
        "hold": "held",
        "know": "knew known",
        "lead": "led",
        "leave": "left",
        "life": "lives",
        "lose": "lost loss losses",
        "man": "men",
        "mean": "meant",
        "meet": "met",
        "pay": "paid",
        "person": "people persons",
        "ride": "rode ridden",
        "rise": "rose risen",
        "run": "ran",
        "seek": "sought",
        "sell": "sold",
        "send": "sent",
        "shake": "shook shaken",
        "shoot": "shot shots",
        "sing": "sang sung",
        "sink": "sank sunk",
        "speak": "spoke spoken",
        "spend": "spent",
        "stand": "stood",
        "steal": "stole stolen",
        "strike": "struck",
        "swim": "swam swum",
        "teach": "taught",
        "think": "thought",
        "throw": "threw thrown",
        "tooth": "teeth",
        "wear": "wore worn",
        "win": "won winner winners winning",
        "woman": "women",
        "write": "wrote written",
    }.items()
    for form in forms.split()
}


@functools.lru_cache(maxsize=100_000)
def word_key(word: str) -> str:
    """What two forms of one word share: case, accents' encoding, possessives and inflection taken away."""
    key = plain_form(word)
    for ending in ("'s", "'"):
        key = key.removesuffix(ending)
    key = _IRREGULAR.get(key, key)
    return _IRREGULAR.get(stem := str(_STEMMER.stem(key)), stem)


def plain_form(word: str) -> str:
    """The word in lower case, with one encoding of accents and apostrophes."""
    return unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


_STEMMER = PorterStemmer()
