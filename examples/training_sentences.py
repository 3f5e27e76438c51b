"""What the example adapter learns from: short messages, made from phrases, with a known intent.

The topics are other ones than those of `corpus.txt`, and so are the wordings: what the adapter does
on the corpus it has learned, not memorised.
"""

import random
from dataclasses import dataclass

INTENTS = ("complaint", "praise", "question", "notice")
TOPICS = {
    "airline": ("flight", "suitcase", "cabin crew", "boarding pass"),
    "bakery": ("bread", "birthday cake", "baker", "coffee"),
    "museum": ("exhibition", "guide", "ticket desk", "audio tour"),
    "laptop": ("laptop", "keyboard", "repair team", "charger"),
    "dentist": ("appointment", "filling", "dentist", "waiting room"),
    "bicycle": ("bicycle", "brake", "mechanic", "saddle"),
    "swimming pool": ("pool", "changing room", "lifeguard", "water"),
    "newspaper": ("newspaper", "article", "editor", "subscription"),
    "taxi": ("taxi", "driver", "fare", "booking"),
    "supermarket": ("fruit", "cashier", "delivery", "milk"),
    "theatre": ("play", "actor", "balcony seat", "programme"),
    "insurance": ("policy", "claim", "adviser", "contract"),
    "hairdresser": ("haircut", "hairdresser", "colour", "salon"),
    "car repair": ("car", "engine", "workshop", "invoice"),
    "post office": ("parcel", "letter", "counter", "postman"),
    "energy supplier": ("power bill", "meter", "hotline", "tariff"),
}
PHRASES = {
    "complaint": (
        "The {0} was a disaster and nobody cared.",
        "I waited two hours because of the {0}, and then it was wrong.",
        "My {0} is broken again and I want my money back.",
        "We were treated rudely when we asked about the {0}.",
        "Terrible {0}, never again.",
        "You promised me the {0} last week and I still have nothing.",
        "The {0} was dirty, late and overpriced.",
        "Why was I charged twice for the {0}? This is outrageous.",
        "I am very disappointed with the {0}.",
        "It is the third time that the {0} has failed, I have had enough.",
        "The {0} did not work at all and they refused to help.",
        "Nobody answers my letters about the {0}.",
    ),
    "praise": (
        "The {0} was excellent, thank you so much.",
        "I have never had a better {0}.",
        "We were delighted with the {0} and will return.",
        "What a lovely {0}, it made my day.",
        "Wonderful {0}, highly recommended.",
        "Thank you for the {0}, my family was thrilled.",
        "The {0} was friendly, quick and perfect in every way.",
        "I am so happy with the {0}.",
        "Everything about the {0} was a pleasure.",
        "They went out of their way to help me with the {0}.",
        "The {0} is beautiful and worth every penny.",
        "Ten out of ten for the {0}.",
    ),
    "question": (
        "What does the {0} cost?",
        "Could you tell me where to find the {0}?",
        "Is the {0} available on Sunday?",
        "How long does the {0} take?",
        "Do I need to pay for the {0} in advance?",
        "Can I change my {0} by telephone?",
        "When will the {0} be ready?",
        "Which {0} would suit a family with two children?",
        "May I bring my own {0}?",
        "Are there discounts on the {0} for pensioners?",
        "Does the {0} come with a guarantee?",
        "Who do I ask about the {0}?",
    ),
    "notice": (
        "The {0} will be closed from Monday to Thursday.",
        "From next month the {0} costs two euros less.",
        "A new {0} starts on the fifth of April.",
        "Please note that the {0} moves to the first floor.",
        "The {0} is now open until eight in the evening.",
        "Because of building works the {0} is at the back entrance.",
        "The {0} returns after the summer break.",
        "Starting in October, the {0} can be ordered online.",
        "There is no {0} on public holidays.",
        "The {0} has been extended until the end of March.",
        "Opening hours of the {0} change on the first of May.",
        "Everyone receives a new {0} in the coming weeks.",
    ),
}


@dataclass(frozen=True, slots=True)
class Labelled:
    """A training sentence; `intent` is an index into `INTENTS`."""

    sentence: str
    topic: str
    intent: int


def draw_batch(chance: random.Random, topics: int, each: int) -> list[Labelled]:
    """`each` sentences of every intent for each of `topics` topics.

    Every sentence has others of its topic with another intent, and of its intent with another topic.
    """
    batch = []
    for topic in chance.sample(sorted(TOPICS), topics):
        for intent, name in enumerate(INTENTS):
            batch.extend(
                Labelled(phrase.format(chance.choice(TOPICS[topic])), topic, intent)
                for phrase in chance.sample(PHRASES[name], each)
            )
    return batch
