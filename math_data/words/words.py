#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
r"""Make train.jsonl and heldout.jsonl: word problems of our own, on five levels, with exact answers.

    python math_data/words/words.py                 # one second; the same bytes every time

A template is a function. Its docstring holds the wordings, each behind a dash; a parameter's default says what may be
drawn for it; it returns the answer, or the answer and the other things that the wordings show, or None where a draw
does not suit. A class is a level: a drawer of functions, never instantiated.

In a wording, [each|every] is one of the two, {n} is the value of n, and {n:form} is its value in one of the FORMS.
{A}, {B} and {C} are three people; {he}, {him} and {his} stand for {A}.

No template has the same numbers twice, under whatever wording and names, so no problem can be in both files. Which file
a problem belongs to is a hash of its template and numbers. No answer is a number that stands in its problem.
"""
import inspect
import json
import random
import re
from fractions import Fraction
from hashlib import sha256
from math import ceil, comb, gcd, isqrt, lcm
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAIN, HELD_OUT = 900, 110                     # problems of each level, rounded up to as many of each template

NAMES = """Amina she, Anton he, Bea she, Bruno he, Carla she, Chen he, Dario he, Ida she, Elif she, Emil he, Fatima she,
Felix he, Grace she, Gus he, Hana she, Hugo he, Ines she, Ivan he, Jamal he, Julia she, Kofi he, Kira she, Leo he,
Lena she, Malik he, Mina she, Nadia she, Noah he, Olga she, Omar he, Petra she, Paolo he, Ravi he, Rosa she, Sami he,
Sofia she, Tariq he, Tess she, Vera she, Viktor he, Wanda she, Yuki she, Yusuf he, Zoe she""".split(",")
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
COUNT = "zero one two three four five six seven eight nine ten eleven twelve".split()

TREASURE = "marble, sticker, shell, badge, postcard, coin, stamp, button, bead, trading card, pebble".split(", ")
BAKED = "biscuit, muffin, pancake, waffle, bread roll, cupcake, dumpling, pretzel, scone".split(", ")
FRUIT = "apple, pear, orange, plum, lemon, peach, fig, apricot".split(", ")
PLANT = "tulip, carrot, cabbage, onion, rose bush, lettuce, pumpkin, sunflower".split(", ")
SWEET = "toffee, jelly bean, walnut, strawberry, chocolate, cherry, caramel, gumdrop".split(", ")
GOODS = "mug, notebook, candle, poster, puzzle, cap, water bottle, paintbrush, plant pot".split(", ")
SNACK = "sandwich, smoothie, burger, milkshake, salad, slice of cake, bowl of soup".split(", ")
GIFT = "board game, football, kite, helmet, watch, lamp, raincoat, model aeroplane".split(", ")
GARMENT = "coat, suitcase, guitar, desk, tent, camera, radio, rucksack".split(", ")
PARTS = [Fraction(a, b) for b in range(2, 10) for a in range(1, b) if gcd(a, b) == 1]


def plural(noun):
    """boxes for box, cherries for cherry, slices of cake for slice of cake."""
    head, of, rest = noun.partition(" of ")
    return re.sub("(?<=[^aeiou])ys$", "ies", head + ("es" if re.search("(s|x|ch|sh)$", head) else "s")) + of + rest


FORMS = {                                      # what {value:form} looks like
    "": str,
    "s": plural,
    "a": lambda value: f"{'an' if re.match('[aeio]|8|(11|18)$', str(value)) else 'a'} {value}",
    "word": lambda n: COUNT[n] if n < len(COUNT) else str(n),
    "times": lambda n: "twice" if n == 2 else COUNT[n] + " times",
    "part": lambda n: ["half", "a third", "a quarter", "a fifth"][n - 2],
    "clock": lambda minutes: f"{minutes // 60}:{minutes % 60:02}",
    "signed": lambda n: f"{'-' if n < 0 else '+'} {abs(n)}",
}


def whole(a, b=1):
    """a / b where that is a whole number, else None: the draw does not suit."""
    return a // b if a % b == 0 else None


def latex(value):
    r"""A whole number, a fraction as \frac{3}{4}, or text as it is."""
    if isinstance(value, Fraction) and value.denominator > 1:
        return f"{'-' * (value < 0)}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return str(value)


def multiple(factor, symbol):
    r"""A positive multiple of \pi or of a root: 12\pi, or \frac{\sqrt{2}}{3}."""
    factor = Fraction(factor)
    top = f"{factor.numerator if factor.numerator > 1 or not symbol else ''}{symbol}"
    return top if factor.denominator == 1 else f"\\frac{{{top}}}{{{factor.denominator}}}"


def root(n, factor=1):
    r"""factor times the square root of n, with the smallest number under the root: root(18) is 3\sqrt{2}."""
    out = max(k for k in range(1, isqrt(n) + 1) if n % k ** 2 == 0)
    return multiple(Fraction(factor) * out, f"\\sqrt{{{n // out ** 2}}}" if n > out ** 2 else "")


class Level1:
    """One step with small numbers."""

    def gain(a=range(3, 21), b=range(2, 16), thing=TREASURE):
        """- {A} has {a} {thing:s}. {B} gives {him} {b} more. How many {thing:s} does {A} have now?
        - {A} kept {a} {thing:s} in a box. Today {he} found {b} more and put them in. How many are in the box now?
        - My collection of {a} {thing:s} has just grown by {b}. How many {thing:s} do I own now?"""
        return a + b

    def loss(a=range(6, 31), b=range(2, 25), food=BAKED):
        """- {A} made {a} {food:s} and [{his} family|the neighbours|{his} friends] ate {b} of them. How many are left?
        - There are {a} {food:s} on a tray. If {b} of them are [eaten|sold|given away], how many stay on the tray?
        - Of the {a} {food:s} that {A} made this morning, {b} are already gone. How many remain?"""
        return a - b if a > b + 1 else None

    def rows(r=range(2, 13), c=range(3, 19), plant=PLANT):
        """- {A} plants {r} rows of {plant:s} with {c} {plant:s} in each row. How many {plant:s} does {he} plant?
        - A [small cinema|concert tent|village hall] has {r} rows of {c} chairs. How many chairs are there?
        - How many {plant:s} grow in a field that has {r} rows with {c} {plant:s} in every row?"""
        return r * c

    def share(k=range(2, 11), each=range(2, 17), sweet=SWEET):
        """- {A} shares {total} {sweet:s} equally among {k} [children|friends]. How many does each of them get?
        - {k:word} [friends|cousins|neighbours] split a bag of {total} {sweet:s} evenly. How many does each one get?
        - If {total} {sweet:s} go into {k} bags, with as many in one bag as in another, how many are in a bag?"""
        return each, {"total": k * each}

    def packs(size=range(3, 13), n=range(2, 17)):
        """- Eggs come in boxes of {size}. How many boxes does {A} [need for|fill with] {total} eggs?
        - A [machine|worker] packs {total} [golf balls|bulbs|tins] in cartons of {size}. How many cartons is that?
        - {total} children line up in teams of {size}. How many teams are there?"""
        return n, {"total": size * n}

    def older(a=range(4, 41), d=range(2, 16)):
        """- {A} is {a} years old. {his} [cousin|neighbour|friend] {B} is {d} years older. How old is {B}?
        - {B} was {d} years old on the day when {A} was born. Today {A} turns {a}. How old is {B} today?
        - How old is {B}, who is {d} years older than {A}, if {A} is {a}?"""
        return a + d

    def more(a=range(8, 41), b=range(3, 35), thing=TREASURE):
        """- {A} has {a} {thing:s} and {B} has {b}. How many more {thing:s} does {A} have than {B}?
        - {A} won a game with {a} points to {B}'s {b}. By how many points did {he} win?
        - {a} people came to the [choir|chess club] on Monday and {b} on Tuesday. How many fewer came on Tuesday?"""
        return a - b if a > b + 1 else None

    def price(n=range(2, 13), p=range(2, 16), thing=GOODS):
        """- One {thing} costs {p} dollars. How many dollars do {n} {thing:s} cost?
        - {A} buys {n} {thing:s} at {p} dollars each. How much does {he} pay, in dollars?
        - A shop sells {thing:s} for {p} dollars apiece. What do {n} of them cost, in dollars?"""
        return n * p

    def change(p=range(3, 96), note=(10, 20, 50, 100)):
        """- The bill at the café comes to {p} dollars. How many dollars does {A} get back from a {note}-dollar note?
        - {A} buys a present for {p} dollars and hands over a {note}-dollar note. How many dollars of change are due?
        - I have spent {p} of my {note} dollars at the [fair|market|station]. How many dollars do I have left?"""
        return note - p if note // 5 < p < note else None

    def cut(a=range(15, 96), b=range(5, 91)):
        """- A [ribbon|piece of string] is {a} cm long. {A} cuts off {b} cm. How many centimetres are left?
        - {A} needs {a} cm of [tape|wire|lace] and has only {b} cm. How many centimetres are missing?
        - A snail wants to climb a post of {a} cm and has managed {b} cm. How many centimetres are still to go?"""
        return a - b if a > b + 2 else None

    def times_as_many(a=range(3, 26), k=range(2, 7), fruit=FRUIT):
        """- {A} picked {a} {fruit:s}. {B} picked {k:times} as many. How many {fruit:s} did {B} pick?
        - {A} walks to school in {a} minutes. For {B} it takes {k:times} as long. How many minutes does {B} walk?
        - A small basket holds {a} {fruit:s}, a big one {k:times} as many. How many {fruit:s} fit into the big one?"""
        return a * k

    def part_of(k=range(2, 6), q=range(3, 31)):
        """- {A} has read {k:part} of a book with {total} pages. How many pages has {he} read?
        - {total} guests are at a party and {k:part} of them [wear hats|play cards|dance]. How many guests is that?
        - A jar holds {total} coins. {A} takes out {k:part} of them. How many coins does {he} take?"""
        return q, {"total": k * q}


class Level2:
    """Two or three steps: money, time, speed, sharing, comparing."""

    def shopping(n=range(2, 7), p=range(3, 16), m=range(2, 7), q=range(2, 10), thing=GOODS, snack=SNACK):
        """- {A} buys {n} {thing:s} at {p} dollars each and {m} {snack:s} at {q} dollars each. {he} pays with {notes}
          dollars. How many dollars does {he} get back?
        - A {thing} costs {p} dollars and {snack:a} {q} dollars. {A} came with {notes} dollars and bought {n} {thing:s}
          and {m} {snack:s}. How many dollars does {he} have left?"""
        back = -(n * p + m * q) % 50
        return back or None, {"notes": n * p + m * q + back}

    def saving(start=range(5, 41), w=range(3, 13), k=range(3, 11), p=range(15, 61), gift=GIFT):
        """- {A} has {start} dollars and saves {w} dollars [each|every] week. After {k} weeks {he} buys {gift:a} for {p}
          dollars. How many dollars does {he} have left?
        - For {k} weeks {A} put {w} dollars a week into a money box that already held {start} dollars. Then {he} took
          out {p} dollars for {gift:a}. How many dollars stayed in the box?"""
        left = start + w * k - p
        return left if left > 1 and p > start else None

    def three_collectors(a=range(5, 31), d=range(2, 13), k=range(2, 5), thing=TREASURE):
        """- {A} has {a} {thing:s}. {B} has {d} more than {A}, and {C} has {k:times} as many as {B}. How many {thing:s}
          do the three of them have together?
        - {C} has {k:times} as many {thing:s} as {B}, {B} {d} more than {A}, and {A} {a}. How many is that in all?"""
        return a + (k + 1) * (a + d)

    def drive(t=range(2, 6), v=range(40, 75, 5), u=range(2, 6), w=range(75, 115, 5)):
        """- How many km does a [van|coach] drive in {t} hours at {v} km per hour and then {u} hours at {w} km per hour?
        - On the way to [the coast|the mountains|{his} aunt], {A} drove {t} hours on country roads at {v} km/h and then,
          after lunch, {u} hours on the motorway at {w} km/h. How many kilometres long was the way?"""
        return t * v + u * w

    def bags(n=range(3, 13), m=range(10, 41), size=range(4, 13), fruit=FRUIT):
        """- {n} crates of {m} {fruit:s} arrive at a shop. {bad} {fruit:s} are [bruised|rotten|too soft] and the others
          are packed into bags of {size}. How many bags does that make?
        - {A} packs {fruit:s} into bags of {size}. There are {n} crates with {m} {fruit:s} in each, but {he} has to
          throw {bad} of these {fruit:s} away. How many bags can {he} fill?"""
        return (n * m // size, {"bad": n * m % size}) if n * m % size > 1 else None

    def clock(start=range(425, 600), time=range(65, 120), stop=range(5, 30)):
        """- A train leaves at {start:clock} in the morning and arrives at {end:clock}. It stands still for {stop}
          minutes altogether. For how many minutes does it move?
        - {A}'s [rehearsal|exam|shift] began at {start:clock} this morning and was over at {end:clock}. How many minutes
          was it without the break of {stop} minutes?"""
        return time - stop, {"end": start + time}

    def fence(w=range(5, 40), l=range(8, 60), p=range(3, 16)):
        """- {A} puts a fence around a rectangular garden that is {l} metres long and {w} metres wide. A metre of fence
          costs {p} dollars. How many dollars does the whole fence cost?
        - How many dollars is a fence around a rectangular paddock of {l} m by {w} m, at {p} dollars a metre?"""
        return 2 * (w + l) * p if w < l else None

    def novel(p=range(10, 31), d=range(2, 8), r=range(3, 10), each=range(12, 41)):
        """- A book has {total} pages. {A} reads {p} pages a day for {d} days and wants to finish it in {r} more days,
          with the same number of pages on each of them. How many pages a day is that?
        - {A} must give {total:a}-page novel back to the library. For {d} days {he} read {p} pages a day, and {r} days
          are left. Reading the same number on each of these, how many pages a day must {he} read?"""
        return each, {"total": p * d + r * each}

    def tickets(a=range(2, 7), p=range(9, 21), c=range(2, 9), q=range(4, 9), off=range(5, 16)):
        """- Tickets for the [zoo|museum|aquarium] cost {p} dollars for an adult and {q} dollars for a child. What do
          {a} adults and {c} children pay in all, in dollars, with a voucher for {off} dollars off the bill?
        - With a voucher that takes {off} dollars off the bill, a group of {a} adults and {c} children goes to the
          [theatre|circus]. Adults pay {p} dollars each, children {q} dollars. How many dollars does the group pay?"""
        return a * p + c * q - off

    def bus(n=range(12, 41), x=range(3, 12), y=range(2, 12)):
        """- A bus leaves the station with {n} passengers. At the first stop {x} of them get off and {y} people get on.
          At the second stop half of all passengers get off. How many stay on the bus?
        - {n} people sit on a tram. First {x} leave and {y} others get on; a little later, half of those who are then on
          it leave. How many are still on the tram?"""
        return whole(n - x + y, 2)

    def leak(r=range(8, 31), leak=range(2, 7), t=range(6, 40)):
        """- A tap pours {r} litres of water a minute into an empty [trough|tank|pool], but {leak} litres a minute leak
          out. After how many minutes does it hold {total} litres?
        - A cracked cistern loses {leak} litres a minute while a hose brings in {r} litres a minute. It was empty at
          first. How many minutes does it take until there are {total} litres in it?"""
        return t, {"total": (r - leak) * t}

    def wages(p=range(11, 25), h=range(12, 36), q=range(3, 9), k=range(3, 9)):
        """- {A} earns {p} dollars an hour on weekdays and {q} dollars an hour more on Sundays. Last week {he} worked
          {h} hours on weekdays and {k} hours on Sunday. How many dollars did {he} earn?
        - A [baker|waiter|nurse] gets {p} dollars for an hour, and on Sundays {q} dollars an hour on top. How much is
          that, in dollars, for {h} hours on weekdays and {k} hours on a Sunday?"""
        return p * h + (p + q) * k

    def recipe(n=range(4, 13), g=range(10, 31), m=range(5, 31), food=BAKED):
        """- A recipe for {n} {food:s} takes {flour} grams of flour. How many grams does {A} need for {m} {food:s}?
        - {A} wants {m} {food:s}, but the recipe, with {flour} g of flour, is for {n}. How many grams is that?"""
        return (g * m, {"flour": g * n}) if m % n else None


class Level3:
    """Fractions, percentages, ratios, averages, rates, and equations in words."""

    def two_discounts(p=range(40, 405, 5), x=range(10, 55, 5), y=range(5, 30, 5), thing=GARMENT):
        """- A {thing} costs {p} dollars. In the sale its price is cut by {x}%, and members of the shop's club get
          another {y}% off the reduced price. How many dollars does a member pay?
        - The price of a {thing} was {p} dollars. It fell by {x}% in spring and then by {y}% of the new price in autumn.
          What does it cost now, in dollars?"""
        return whole(p * (100 - x) * (100 - y), 10000)

    def two_parts(f=PARTS, g=PARTS, total=range(60, 601, 6), gift=GIFT):
        """- {A} spends {f} of {his} savings on {gift:a} and {g} of what is left on a train ticket. Now {he} has {left}
          dollars. How many dollars did {he} have at first?
        - {A} gave {f} of {his} stamps to {B} and {g} of the others to {C}. {left} were left. How many were there?"""
        left = total * (1 - f) * (1 - g)
        return (total, {"left": left}) if left.denominator == (total * f).denominator == 1 else None

    def ratio(a=range(2, 10), b=range(3, 14), k=range(3, 31), flower=("tulip", "daisy", "iris", "lily")):
        """- {A} and {B} share {total} dollars in the ratio {a} : {b}. How many dollars more does {B} get than {A}?
        - Blue and yellow paint are mixed in the ratio {a} : {b} to make {total} litres of green paint. How many more
          litres of yellow than of blue are in it?
        - For every {a} {flower:s} in a park there are {b} roses. The park has {total} of these flowers. By how many do
          the roses outnumber the {flower:s}?"""
        return (k * (b - a), {"total": k * (a + b)}) if a < b and gcd(a, b) == 1 else None

    def next_test(n=range(3, 10), m=range(60, 91), up=range(1, 6)):
        """- After {n} tests {A} averages {m} points. What score in the next test will raise {his} average to {goal}?
        - {A} wants an average of {goal} points. In the first {n} rounds of the quiz {his} average was {m}. What does
          {he} have to score in the one round that is left?"""
        need = m + (n + 1) * up
        return (need, {"goal": m + up}) if need <= 100 else None

    def mean_speed(t=range(2, 6), v=range(8, 31), u=range(2, 6), w=range(8, 31)):
        """- {A} cycles {far} km at {v} km/h and then {further} km at {w} km/h. What is {his} average speed, in km/h?
        - On the first {far} km of a trip a ferry goes at {v} km/h, on the last {further} km at {w} km/h. What is its
          average speed over the whole trip, in km/h?"""
        speed = whole(t * v + u * w, t + u)
        return (speed, {"far": t * v, "further": u * w}) if speed and v != w else None

    def together(a=range(2, 19), b=range(3, 19)):
        """- Alone, {A} paints [the fence|the hall] in {a} hours and {B} in {b} hours. How many hours do they need
          together? Give a fraction in lowest terms if it is not a whole number.
        - One pipe fills a pool in {a} hours, another in {b} hours. How many hours does it take with both pipes open?
          Answer with a whole number or a fraction in lowest terms."""
        return Fraction(a * b, a + b) if a < b else None

    def secret_number(x=range(2, 26), a=range(2, 8), c=range(4, 13), b=range(3, 60), d=range(3, 40)):
        """- {A} thinks of a number. If {he} multiplies it by {a} and adds {b}, {he} gets the same as if {he} multiplies
          it by {c} and subtracts {d}. What is the number?
        - {c:word} times a number, less {d}, is equal to {a} times the same number plus {b}. Find the number."""
        return x if a < c and a * x + b == c * x - d else None

    def ages(b=range(2, 40), y=range(2, 16), k=range(2, 5)):
        """- {A} and {B} are {total} years old together. In {y} years {A} is {k:times} {B}'s age. How old is {B} now?
        - In {y} years {A} will be {k:times} as old as {B}. Today their ages add up to {total}. How old is {B} today?"""
        a = k * (b + y) - y
        return (b, {"total": a + b}) if a <= 90 else None

    def dilute(v=range(2, 61), p=range(10, 65, 5), q=range(4, 40)):
        """- How many litres of water turn {v} litres of {p:a}% [salt|sugar] solution into {q:a}% solution?
        - {A} has {v} litres of a drink with {p}% juice in it. How many litres of water does {he} have to add so that
          only {q}% of the drink is juice?"""
        return whole(v * (p - q), q) if q < p else None

    def machines(k=range(2, 8), h=range(2, 8), u=range(3, 16), m=range(3, 13), t=range(3, 13)):
        """- {k} machines make {made} [screws|cups] in {h} minutes. How many do {m} such machines make in {t} minutes?
        - In {h} hours, {k} bakers bake {made} rolls. At this pace, how many rolls do {m} bakers bake in {t} hours?"""
        return (m * t * u, {"made": k * h * u}) if m != k and t != h else None

    def old_price(p=range(20, 405, 5), x=range(5, 65, 5), thing=GARMENT):
        """- After its price was cut by {x}%, a {thing} costs {sale} dollars. How many dollars did it cost before?
        - {A} got a discount of {x}% and paid {sale} dollars for a {thing}. What was the full price in dollars?"""
        sale = whole(p * (100 - x), 100)
        return (p, {"sale": sale}) if sale else None

    def refill(f=PARTS, g=PARTS, size=range(24, 481, 6)):
        """- A tank is {f} full. With {more} litres more it is {g} full. How many litres does the full tank hold?
        - {A}'s rain barrel was {f} full before the storm and {g} full after it. The storm brought {more} litres. How
          many litres can the barrel hold?"""
        more = size * (g - f)
        return (size, {"more": more}) if more > 1 and more.denominator == (size * f).denominator == 1 else None


class Level4:
    """Systems, quadratics, sequences, number theory, counting, probability, geometry."""

    def stall(a=range(2, 8), b=range(2, 8), c=range(2, 8), d=range(2, 8), p=range(30, 99), q=range(9, 99), fruit=FRUIT):
        """- At a stall, {a} {fruit:s} and {b} bananas cost {x} cents, while {c} {fruit:s} and {d} bananas cost {y}
          cents. What is the price of one {fruit}, in cents?
        - {A} paid {x} cents for {a} {fruit:s} and {b} rolls, {B} paid {y} cents for {c} {fruit:s} and {d} rolls at the
          same prices. How many cents does one {fruit} cost?"""
        return (p, {"x": a * p + b * q, "y": c * p + d * q}) if a * d != b * c else None

    def trip(n=range(6, 41), d=range(2, 9), each=range(6, 61)):
        """- Some friends share the cost of a [boat|hut|minibus], {cost} dollars, equally. If there were {d} fewer of
          them, each would have to pay {more} dollars more. How many friends are there?
        - A club wants to split a bill of {cost} dollars evenly among its members. Then {d} members drop out, and each
          of the others has to pay {more} dollars more than planned. How many members were there at first?"""
        more = whole(each * d, n - d) if n > d + 1 else None
        return (n, {"cost": n * each, "more": more}) if more and more > 1 else None

    def theatre(a=range(8, 31), d=range(2, 6), n=range(8, 31)):
        """- The first row of a theatre has {a} seats, and each row behind it has {d} seats more than the row before.
          How many seats are there in all {n} rows?
        - {A} saves {a} cents on the first day and on each later day {d} cents more than on the day before. How many
          cents has {he} saved after {n} days?"""
        return n * (2 * a + (n - 1) * d) // 2

    def tiles(i=range(2, 15), j=range(3, 20), g=range(8, 61)):
        """- A floor of {w} cm by {h} cm is to be covered with square tiles, all of one size and none of them cut. What
          is the smallest number of tiles that can do it?
        - {A} cuts a piece of cloth of {w} cm by {h} cm into equal squares so that nothing is left over. The squares are
          as large as possible. How many squares does {he} get?"""
        return (i * j, {"w": i * g, "h": j * g}) if i < j and gcd(i, j) == 1 else None

    def buses(a=range(4, 21), b=range(6, 31), c=range(8, 41)):
        """- Three bus lines leave the station every {a}, {b} and {c} minutes. At noon, three buses leave together.
          After how many minutes do three buses leave together again for the first time?
        - Three lighthouses flash every {a}, {b} and {c} seconds. They have just flashed together. In how many seconds
          will all three flash together again?"""
        return lcm(a, b, c) if a < b < c and lcm(a, b, c) not in (c, a * b * c) else None

    def left_over(a=range(5, 16), b=range(6, 20), n=range(20, 250), thing=TREASURE):
        """- {A} has fewer than {limit} {thing:s}. In piles of {a}, {r} are left over; in piles of {b}, {s} are left
          over. How many {thing:s} does {A} have?
        - A number of scouts smaller than {limit} is on parade. When they stand in rows of {a}, there are {r} too many
          for full rows, and in rows of {b} there are {s} too many. How many scouts are there?"""
        suits = a < b and gcd(a, b) == 1 and b < n < a * b and n % a > 1 and n % b > 1
        return (n, {"limit": a * b, "r": n % a, "s": n % b}) if suits else None

    def divisors(n=range(40, 1200, 4)):
        """- {n} chairs are set up in rows with the same number of chairs in each row. A row may have any number of
          chairs from 1 to {n}. How many arrangements are possible?
        - How many positive divisors does {n} have?
        - {A} puts all of {his} {n} [photos|coins|cards] into equal piles. How many different sizes can such a pile
          have, if one big pile and piles of one are allowed too?"""
        count = sum(n % k == 0 for k in range(1, n + 1))
        return count if count > 6 else None

    def detour(a=range(3, 9), b=range(3, 9), c=range(1, 8), d=range(1, 8)):
        """- On a square grid of streets, {A}'s school is {a} blocks east and {b} north of {his} home. {he} walks only
          east and north and passes the bakery, {right} blocks east and {up} north of home. How many ways are there?
        - A robot moves from $(0,0)$ to $({a},{b})$ in steps of 1 to the right or 1 up, and has to pass through the
          point $({right},{up})$. How many different paths can it take?"""
        return (comb(c + d, c) * comb(a - c + b - d, b - d), {"right": c, "up": d}) if 1 < c < a and 1 < d < b else None

    def committee(m=range(4, 10), w=range(4, 10), a=range(2, 5), b=range(2, 5)):
        """- In how many ways can a committee of {a} men and {b} women be chosen from {m} men and {w} women?
        - In how many ways can a [choir|band] of {w} girls and {m} boys send {b} girls and {a} boys to a contest?"""
        return comb(m, a) * comb(w, b) if a < m and b < w else None

    def same_colour(r=range(2, 10), g=range(2, 10), b=range(2, 10)):
        """- In a drawer there are {r} red, {g} green and {b} blue socks. {A} takes two of them in the dark. What is the
          probability that they have the same colour? Give a fraction in lowest terms.
        - A bag holds {r} red, {g} green and {b} blue balls. Two balls are drawn at random, without putting the first
          one back. How likely is it that their colours match? Answer with a fraction in lowest terms."""
        return Fraction(comb(r, 2) + comb(g, 2) + comb(b, 2), comb(r + g + b, 2))

    def ship(a=range(2, 13), b=range(2, 16), c=range(2, 13)):
        """- A ship sails {a} km to the east, then {b} km to the north, then {c} km to the east again. How many
          kilometres is it from its starting point, as the crow flies? Give the exact value.
        - {A} walks {a} km south, {b} km west and another {c} km south over a flat desert. What is the exact distance to
          {his} starting point in a straight line, in km?"""
        return root((a + c) ** 2 + b ** 2)

    def angles(a=range(1, 12), b=range(2, 14), c=range(3, 20)):
        """- The angles of a triangle are in the ratio {a} : {b} : {c}. How many degrees does the largest angle have?
        - How many degrees is the largest angle of a triangle whose angles are as {a} to {b} to {c}?"""
        return whole(180 * c, a + b + c) if a < b < c and gcd(a, b, c) == 1 else None

    def crossing(x=range(-7, 8), y=range(-9, 10), a=range(2, 7), c=range(-7, -1)):
        """- At which point do the lines $y = {a}x {b:signed}$ and $y = {c}x {d:signed}$ cross? Give an ordered pair.
        - Two straight roads on a map follow $y = {c}x {d:signed}$ and $y = {a}x {b:signed}$. Give the point where they
          meet as an ordered pair $(x,y)$."""
        b, d = y - a * x, y - c * x
        return (f"({x},{y})", {"b": b, "d": d}) if b and d and x else None

    def pond(r=range(3, 31), w=range(1, 10)):
        r"""- A round pond with a radius of {r} metres has a path around it that is {w:word} metres wide everywhere.
          What is the area of the path, in square metres, as a multiple of $\pi$?
        - {A} lays a ring of grass, {w:word} metres wide, around a circular flower bed of radius {r} metres. How many
          square metres of grass is that? Give the exact answer in terms of $\pi$."""
        return multiple((r + w) ** 2 - r ** 2, r"\pi") if 1 < w < r else None


class Level5:
    """Competition-like: a known tool has to be found first."""

    def power(a=range(2, 30), n=range(11, 200), m=range(7, 31)):
        """- What is the remainder when ${a}^{{n}}$ is divided by ${m}$?
        - {m} chairs stand in a circle, numbered from 0 to {last} clockwise. A token starts on chair 0 and moves
          ${a}^{{n}}$ chairs clockwise. What is the number of the chair on which it stops?"""
        return (pow(a, n, m), {"last": m - 1}) if gcd(a, m) == 1 and a % m > 1 else None

    def neither(n=range(90, 999), a=range(3, 13), b=range(4, 19)):
        """- How many whole numbers from 1 to {n} are divisible by neither {a} nor {b}?
        - Lamps with the numbers 1 to {n} are lit. {A} switches off each lamp whose number is a multiple of {a}. Then
          {B} switches off those of the others whose number is a multiple of {b}. How many lamps are still lit?
        - The numbers from 1 to {n} are on a board. {A} wipes out all multiples of {a}, then {B} all multiples of {b}
          that are still there. How many numbers remain?"""
        return n - n // a - n // b + n // lcm(a, b) if a < b and b % a else None

    def reciprocals(a=range(2, 16), b=range(2, 30), c=range(2, 25)):
        r"""- The equation $x^3 - {a}x^2 + {b}x - {c} = 0$ has three complex roots $r$, $s$ and $t$. Find $\frac1{rs} +
          \frac1{st} + \frac1{tr} + \frac1r + \frac1s + \frac1t$ as a fraction in lowest terms.
        - Three complex numbers $u$, $v$ and $w$ satisfy $u+v+w = {a}$, $uv+vw+wu = {b}$ and $uvw = {c}$. What is the
          sum $\frac1u + \frac1v + \frac1w + \frac1{uv} + \frac1{vw} + \frac1{wu}$? Give a fraction in lowest terms."""
        return Fraction(a + b, c) if (a + b) % c else None

    def handing_out(n=range(8, 31), k=range(3, 6), m=range(2, 5), sweet=SWEET):
        r"""- In how many ways can {n} identical {sweet:s} be given to {k} children so that each gets at least {m}?
        - How many {k}-tuples of whole numbers, none of them less than {m}, have the sum {n}?
        - In how many ways can {A} put {n} equal {sweet:s} into {k} boxes of different colours, at least {m} in each?"""
        return comb(n - k * m + k - 1, k - 1) if n > k * m + 1 else None

    def bounce(h=range(2, 31), f=PARTS):
        """- A ball is dropped from {h} metres. After each bounce it rises to {f} of the height from which it fell,
          without end. How many metres does it travel in all? (A fraction in lowest terms, if not whole.)
        - A bouncing ball comes back up to {f} of its height each time. Let it fall from {h} metres and bounce for ever.
          How many metres does it move in all, down and up? Give a whole number or a fraction in lowest terms."""
        return h * (1 + f) / (1 - f) if f > Fraction(1, 4) else None

    def parallel(a=range(2, 10), b=range(2, 10), u=range(1, 6)):
        """- In the triangle $ABC$, the point $D$ is on $AB$ and $E$ is on $AC$, and $DE$ is parallel to $BC$. If $AD =
          {a}$, $DB = {b}$ and the triangle $ADE$ has area {area}, what is the area of $DBCE$?
        - A line parallel to the base of a triangle cuts one of its other sides into {a} cm above the line and {b} cm
          below it. The small triangle above the line has an area of {area} square centimetres. How many square
          centimetres is the part between the line and the base?"""
        return (u * b * (2 * a + b), {"area": u * a * a}) if gcd(a, b) == 1 else None

    def highest_card(n=range(8, 61), k=range(2, 7)):
        """- From {n} cards, numbered 1 to {n}, {A} draws {k} at random without putting any back. What is the expected
          value of the highest number among them? (A fraction in lowest terms, if it is not whole.)
        - A lottery draws {k} different numbers from 1 to {n}. What is the largest number drawn on average? Give the
          exact expected value, as a whole number or a fraction in lowest terms."""
        return Fraction(k * (n + 1), k + 1)

    def power_in_factorial(n=range(20, 500), p=(2, 3, 5, 7, 11)):
        """- What is the largest $k$ for which ${p}^k$ divides ${n}!$?
        - How many times in a row can the product of 1, 2, 3, ..., {n} be divided by {p} without a remainder?"""
        return sum(n // p ** i for i in range(1, 10))

    def triangle_area(a=range(4, 15), b=range(5, 17), c=range(6, 19)):
        """- A triangle has sides of length {a}, {b} and {c}. What is its exact area?
        - Three straight paths of {a} m, {b} m and {c} m enclose a meadow. How many square metres is the meadow? Give
          the exact value, with a root if there is one."""
        square = (a + b + c) * (a + b - c) * (a - b + c) * (b + c - a)
        return root(square, Fraction(1, 4)) if a < b < c < a + b else None

    def goat(a=range(3, 12), b=range(4, 14), rope=range(5, 24)):
        r"""- A goat is tied to an outer corner of a rectangular barn of {a} m by {b} m with a rope of {rope} m. All
          around the barn is grass. What area can the goat reach, in square metres, as a multiple of $\pi$?
        - On the outside of a shed that measures {a} m by {b} m, a dog is chained to one corner. The chain is {rope} m
          long. How many square metres of the yard outside can it reach? Answer in terms of $\pi$."""
        area = Fraction(3 * rope ** 2 + (rope - a) ** 2 + (rope - b) ** 2, 4)
        return multiple(area, r"\pi") if a < b < rope < a + b else None

    def apart(n=range(7, 31), k=range(2, 8)):
        """- In how many ways can {k} of the {n} chairs in a row be reserved, no two of them neighbours?
        - How many sequences of {n} coin tosses have exactly {k} heads, no two of them directly one after the other?
        - {A} wants to swim on {k} of the next {n} days, but never two days running. How many choices are there?"""
        return comb(n - k + 1, k) if n >= 2 * k + 1 else None

    def telescope(a=range(2, 16), n=range(20, 100)):
        r"""- Find $\frac1{{a} \cdot {a1}} + \frac1{{a1} \cdot {a2}} + \dots + \frac1{{n} \cdot {n1}}$ as one fraction.
        - For each whole number $k$ from {a} to {n}, {A} writes down $\frac1{k(k+1)}$. What is the sum of all these
          numbers, as a fraction in lowest terms?"""
        return Fraction(1, a) - Fraction(1, n + 1), {"a1": a + 1, "a2": a + 2, "n1": n + 1}

    def paving(n=range(3, 8), p=range(2, 10), q=range(2, 10)):
        """- A path {n} m long and 1 m wide is paved all over. There are square slabs of 1 m in {p} colours and slabs of
          2 m by 1 m in {q} colours. How many pavings are there, if the two ends are told apart?
        - Behind a toy engine, {A} couples wagons of length 1, which come in {p} colours, and of length 2, which come in
          {q} colours. Their total length is {n}. How many different trains can {he} make?"""
        ways = [1, p]
        while len(ways) <= n:
            ways.append(p * ways[-1] + q * ways[-2])
        return ways[n]


LEVELS = [Level1, Level2, Level3, Level4, Level5]


def fill(wording, fields, rng):
    """The wording with its choices made, its fields filled in (other braces are LaTeX) and a capital at each start."""
    text = re.sub(r"\[([^][]*\|[^][]*)\]", lambda found: rng.choice(found[1].split("|")), wording)
    text = re.sub(r"\{([A-Za-z]\w*):?(\w*)\}",
                  lambda found: FORMS[found[2]](fields[found[1]]) if found[1] in fields else found[0], text)
    return re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda found: found[0].upper(), text)


def problems(template):
    """Yield (numbers, problem, answer) for as long as one asks, no numbers twice."""
    rng, seen = random.Random(template.__name__), set()
    choices = {name: parameter.default for name, parameter in inspect.signature(template).parameters.items()}
    wordings = [" ".join(wording.split()) for wording in re.split(r"(?m)^ *- ", template.__doc__)[1:]]
    for _ in range(100_000):
        drawn = {name: rng.choice(values) for name, values in choices.items()}
        result = template(**drawn)
        answer, more = result if isinstance(result, tuple) else (result, {})
        shown = {**drawn, **more}
        # The numbers in the first wording, whichever wording is taken; 3 + 5 and 5 + 3 count as the same.
        used = [name for name in re.findall(r"\{(\w+)", wordings[0]) if isinstance(shown.get(name), (int, Fraction))]
        numbers = tuple(sorted({name: shown[name] for name in used}.values()))
        if answer is None or numbers in seen:
            continue
        people = [person.split() for person in rng.sample(NAMES, 3)]
        he, him, his = PRONOUNS[people[0][1]]
        fields = dict(zip("ABC", (name for name, _ in people)), he=he, him=him, his=his, **shown)
        problem, answer = fill(rng.choice(wordings), fields, rng), latex(answer)
        if answer not in re.findall(r"\d+", problem) and answer not in map(str, numbers):
            seen.add(numbers)
            yield numbers, problem, answer
    raise ValueError(f"{template.__name__} has too few numbers to choose from")


def main():
    files = {"train": [], "heldout": []}
    for level, functions in enumerate(LEVELS, 1):
        templates = [function for name, function in vars(functions).items() if not name.startswith("_")]
        for template in templates:
            wanted = {"train": ceil(TRAIN / len(templates)), "heldout": ceil(HELD_OUT / len(templates))}
            for numbers, problem, answer in problems(template):
                digest = sha256(f"{template.__name__} {numbers}".encode()).digest()
                name = "train" if digest[0] % 6 else "heldout"                               # one in six
                if wanted[name]:
                    wanted[name] -= 1
                    files[name].append({"problem": problem, "answer": answer, "kind": f"level {level}",
                                        "template": template.__name__})
                if not any(wanted.values()):
                    break
    texts = [row["problem"] for rows in files.values() for row in rows]
    assert len(set(texts)) == len(texts)
    for name, rows in files.items():
        random.Random(0).shuffle(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_bytes(lines.encode())
        print(len(rows), "problems in", f"{name}.jsonl")


if __name__ == "__main__":
    main()
