"""The phrases of the support-ticket task: what training shows, and what it never shows.

In a sentence {what} is the item with its count ("two desk lamps"), {order} the order number as the customer writes it
and {it}, {them}, {was}, {has} agree with the count; {What} and {Order} begin with a capital. No sentence contains the
name of its issue. A frame puts the customer's name around the sentence.
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    sentences: dict[str, tuple[str, ...]]  # by issue
    frames: tuple[str, ...]
    names: tuple[str, ...]
    items: tuple[tuple[str, str], ...]  # singular, plural


QUANTITY_WORDS = ("", "one", "two", "three", "four", "five", "six")  # by quantity
ORDER_FORMS = (
    "order {}", "#{}", "order #{}", "order no. {}", "ref no. {}", "order number {}", "reference {}", "order ref {}",
)  # fmt: skip

_TRAIN_SENTENCES = {
    "damaged": (
        "I opened {order} today and found {what} smashed to bits.",
        "{What} from {order} came out of the box cracked.",
        "My {order} arrived this morning: {what}, all scratched and dented.",
        "{Order}. I bought {what} and {it} {was} broken on arrival.",
        "The courier must have dropped {order}, since {what} reached me in pieces.",
        "You sent me {what} under {order}, but {it} {has} a big crack down the side.",
        "Sadly {what} turned up torn and bent ({order}).",
        "I got {what}, {order}. The box was crushed and {it} {was} ruined.",
        "Unpacking {order} I saw that {what} had snapped in half.",
        "{What} arrived shattered. My number is {order}.",
        "About {order}: {what} came, but {it} {was} chipped and would not work.",
        "The packaging of {order} was soaked and {what} inside {was} spoiled.",
        "{Order} came today. I ordered {what}, and {it} fell apart when I lifted {them} out.",
        "I can't use {what} from {order} because {it} {was} badly bent in transit.",
        "Please look at {order}. I unwrapped {what} and {it} {was} in a terrible state, with cracks all over.",
        "There are deep scratches and a hole in what you shipped: {what}, {order}.",
    ),
    "missing": (
        "The box for {order} came, but {what} {was} not in it.",
        "I opened {order} and could not find {what} anywhere inside.",
        "{Order} should have included {what}. I looked twice, and the box had no sign of {them}.",
        "You left {what} out of the parcel, {order}.",
        "My parcel arrived incomplete: {what} {was} not packed ({order}).",
        "I paid for {what} on {order}, but {it} {was} absent when I unpacked everything.",
        "Everything in {order} arrived except {what}.",
        "{What} {was} listed on the packing slip of {order}, yet {it} {was} not in the box.",
        "About {order}: somebody forgot to put {what} in the box.",
        "The package from {order} was short. It lacked {what}.",
        "I received the rest of {order}, only {what} never made it into the carton.",
        "Inside the parcel of {order} there was an empty space where {what} should have been.",
        "I counted the contents of {order} and you owe me {what}.",
        "{Order} was delivered today without {what}.",
        "{What} {was} not among the things you sent me in {order}.",
        "When I emptied the box, {what} {was} nowhere to be found. It is {order}.",
        "Only half of {order} turned up. I am short of {what}.",
        "{Order} is incomplete, because {what} did not come with it.",
        "You charged me for {what} in {order}, yet {it} never got packed.",
        "The bag for {order} had gaps. I got all but {what}.",
        "I went through every layer of paper in {order} but never came across {what}.",
        "All the rest of {order} is fine, just send me {what} that you skipped.",
    ),
    "wrong_item": (
        "I asked for {what} in {order}, but you shipped something else.",
        "{Order} was meant to be {what}. What I got is a totally different product.",
        "I ordered {what}, and the box held another thing altogether ({order}).",
        "There was a mix-up with {order}: I wanted {what} and received a different article.",
        "Instead of {what}, somebody else's goods came with {order}.",
        "You sent me the incorrect product. I bought {what}, {order}.",
        "{Order}. I chose {what}, yet what arrived is not what I picked.",
        "I bought {what} and got a product I never asked for. My number is {order}.",
        "About {order}: this is not what I ordered. I selected {what}.",
        "My {order} says {what}, but the parcel contained some other product.",
        "Your warehouse swapped my goods. I should have got {what} with {order}.",
        "{What} {was} on my receipt for {order}, but a different model was in the box.",
        "I expected {what} from {order}. The thing you sent is for someone else.",
        "Someone packed another product in place of {what}, {order}.",
        "The contents of {order} do not match. I requested {what} and unpacked something different.",
        "What came with {order} is the incorrect size and model. I had picked {what}.",
        "This is {order}. I was hoping for {what}, and out came a strange gadget.",
        "{What} {was} what I paid for. {Order} brought me a thing I have never seen before.",
        "You confused my parcel with another. {Order} was for {what}.",
        "Could it be that my label was switched? I unpacked an unrelated object and no {what} ({order}).",
        "I needed {what}. The product you chose to send with {order} is unlike it in every way.",
        "{Order}: please exchange what you sent, since I had asked for {what}.",
    ),
    "late": (
        "I ordered {what} three weeks ago and nothing has come yet ({order}).",
        "Where is {order}? I am still waiting for {what}.",
        "{What} should have been here last Monday. {Order} has still not been delivered.",
        "My {order} for {what} has been stuck in transit for ages.",
        "{Order} with {what} was due on Friday, and there is still no sign of the courier.",
        "I have been waiting for {what} since last month, {order}.",
        "The delivery date of {order} has passed and I do not have {what} yet.",
        "When will {what} arrive? The tracking of {order} has not moved for days.",
        "You promised {what} within two days, but {order} has not shown up so far.",
        "About {order}: the delivery of {what} is long overdue.",
        "{What} under {order} still {has} not reached my house.",
        "It is taking far too long. I bought {what} and {order} is not even shipped yet.",
        "Still no delivery of {order}! I need {what} soon.",
        "{Order} is delayed again. I expected {what} a week ago.",
        "The van never came with {what}. Can you tell me when {order} gets here?",
        "How much longer must I wait for {what}? {Order} was supposed to be here by now.",
    ),
    "refund": (
        "I changed my mind about {what} in {order} and want my money back.",
        "Please give me my money back for {what}, {order}. I no longer need {them}.",
        "I do not want {what} any more. How can I send back {order}?",
        "{Order}: I would like to send {what} back and get repaid.",
        "I bought {what} by accident. Please reverse the payment for {order}.",
        "Can I get my money back on {what}? My number is {order}, and I found {them} cheaper elsewhere.",
        "{What} from {order} did not suit me, so I would like to be paid back.",
        "I wish to cancel the purchase of {what} and be repaid ({order}).",
        "About {order}: I regret buying {what}. Please put the money back on my card.",
        "We have no use for {what} after all. Please repay {order}.",
        "I am not happy with {what} and want to give {them} back for cash, {order}.",
        "My wife already owns {what}, so please take back {order} and repay me.",
        "{Order} was a mistake of mine. I want to hand back {what} and recover what I paid.",
        "{What} {was} a gift that nobody wanted. Please pay me back for {order}.",
        "I decided against {what}. Kindly credit my card for {order}.",
        "Please reimburse me for {order}. I do not like {what} as much as I hoped.",
        "{What} disappointed me. Send the sum I paid for {order} to my account, please.",
        "I clicked on {what} without thinking. Undo {order} and return my payment.",
        "What do I have to do to hand in {what} and get the full price of {order} again?",
        "As {what} {was} a poor choice of mine, I ask you to pay out {order}.",
        "Stop {order}, please. I no longer care for {what} and would rather keep the cash.",
        "I have never used {what}. Take {them} back and transfer the cost of {order}.",
    ),
}

_TEST_SENTENCES = {
    "damaged": (
        "I was sad to see that {what} in {order} had cracks and a broken corner.",
        "{Order} reached me today, but {what} had been crushed on the way.",
        "When I took {what} out of the wrapping, {it} {was} already broken. This is {order}.",
        "You shipped {what} with hardly any padding and {it} came smashed, {order}.",
        "{What} came with dents and scratches everywhere, see {order}.",
        "Regarding {order}, I have {what} here that broke during shipping.",
    ),
    "missing": (
        "I unpacked all of {order}, but {what} {was} not there.",
        "Part of my parcel is absent. {Order} came without {what}.",
        "The carton of {order} arrived today and did not contain {what}.",
        "Your packer forgot {what} when filling the box for {order}.",
        "Regarding {order}, the other things are here, but {what} {was} left out.",
        "I searched the whole package and {what} {was} not inside, {order}.",
    ),
    "wrong_item": (
        "I wanted {what}, but a different product was in the box of {order}.",
        "Regarding {order}, you sent me something I did not order. I ordered {what}.",
        "{Order} contained another product and not {what} as I had requested.",
        "The article I received is not the one I bought. I bought {what} with {order}.",
        "You mixed up my purchase: it should be {what}, and I got something else, {order}.",
        "{What} {was} what I chose in {order}, yet some other thing was sent to me.",
    ),
    "late": (
        "Two weeks have gone by and {what} from {order} still {has} not come.",
        "Regarding {order}, my wait goes on and I would like to know when {what} will be delivered.",
        "{Order} is overdue. You said that {what} would be here on Tuesday.",
        "I keep checking the tracking of {order}, but {what} {has} not arrived yet.",
        "My delivery of {what} is days behind schedule, {order}.",
        "{What} {was} supposed to get here last week. Where is {order} now?",
    ),
    "refund": (
        "I want to give back {what} from {order} and have my money back.",
        "Regarding {order}, I don't need {what} any longer, so please pay me back.",
        "{What} {was} not what I hoped for. I would like my money for {order} back, please.",
        "Would you repay me for {order}? I have changed my mind and do not want {what}.",
        "I ordered {what} by mistake, {order}. Please credit the amount to my card.",
        "{Order}: please take {what} back and reimburse me.",
    ),
}

_TRAIN_FRAMES = (
    "Hi, this is {name}. {body}",
    "{body} Thanks, {name}",
    "Hello, {name} here. {body}",
    "{body}\n{name}",
    "My name is {name}. {body}",
    "Dear team,\n{body}\nRegards,\n{name}",
    "{body} Best wishes, {name}.",
    "Hello! {body} - {name}",
    "{name} writing. {body}",
    "Good morning, I'm {name}. {body} Thank you.",
    "{body} Please write back to {name}.",
    "Name: {name}\n{body}",
)
_TEST_FRAMES = (
    "Hey there, {name} speaking. {body}",
    "{body} Kind regards, {name}",
    "Good evening, my name's {name}. {body}",
    "Hi support,\n{body}\nCheers, {name}",
    "{body} Yours, {name}.",
    "Hello, I am {name}. {body} Please help.",
)

_TRAIN_NAMES = (
    "Maya", "Oliver", "Fatima", "Kenji", "Lucia", "Tariq", "Ingrid", "Kwame", "Priya", "Mateo", "Chloe", "Dmitri",
    "Aisha", "Henrik", "Mei", "Rafael", "Zara", "Bogdan", "Leila", "Tomas", "Noor", "Sven", "Camila", "Arjun",
    "Hannah", "Yusuf", "Beatriz", "Liam", "Sakura", "Emeka", "Freya", "Ivan", "Salma", "Pablo", "Greta", "Hiroshi",
    "Amara", "Lukas", "Divya", "Omar", "Elena", "Jakub", "Thandi", "Felix", "Yuki", "Rosa", "Samir", "Astrid",
    "Chidi", "Nadia", "Marco", "Linh", "Peter", "Ayesha", "Viktor", "Paola", "Rohan", "Emma", "Kofi", "Ling",
    "Grace", "Hassan", "Julia", "Andre", "Adaeze", "Agnes", "Ahmed", "Akira", "Alejandro", "Alma", "Amir", "Anders",
    "Angela", "Anouk", "Antonio", "Anya", "Ariel", "Asha", "Aurora", "Ayumi", "Babak", "Barbara", "Basil", "Bella",
    "Benjamin", "Bianca", "Bilal", "Birgit", "Boris", "Brenda", "Caleb", "Carmen", "Cecilia", "Cheng", "Christa",
    "Claudio", "Connor", "Cyrus", "Dalia", "Darius", "Deepak", "Delphine", "Denis", "Dora", "Eduardo", "Efua",
    "Eleni", "Elias", "Emil", "Enzo", "Esther", "Eva", "Fabian", "Faith", "Farid", "Fernanda", "Fiona", "Florian",
    "Francesca", "Gabriel", "Georgia", "Gita", "Goran", "Gustav", "Hamza", "Haruto", "Hector", "Heidi", "Ibrahim",
    "Ida", "Imani", "Ines", "Isaac", "Ismail", "Jasmine", "Javier", "Jiro", "Joanna", "Jonas", "Jorge", "Josephine",
    "Kamal", "Karim", "Katarina", "Keiko", "Khalid", "Kiran", "Klara", "Lars", "Latifa", "Laura", "Leon", "Lina",
    "Lorenzo", "Luca", "Luisa", "Magnus", "Maja", "Malik", "Manuel", "Margot", "Mariam", "Martin", "Mateusz",
    "Megan", "Mehmet", "Mikhail", "Mina", "Miriam", "Mohan", "Monika", "Musa", "Natalia", "Neil", "Nikhil", "Nina",
    "Nkechi", "Odette", "Oksana", "Oscar", "Otto", "Padma", "Pascal", "Patrick", "Paulina", "Petra", "Philippa",
    "Quentin", "Rahul", "Ramona", "Rashid", "Rebecca", "Renata", "Ricardo", "Robin", "Rosalind", "Ruben", "Ruth",
    "Sabine", "Said", "Sanjay", "Santiago", "Sara", "Sebastian", "Selma", "Serena", "Shira", "Silvia", "Simone",
    "Soren", "Stefan", "Sunita", "Susanna", "Svetlana", "Tamara", "Tatiana", "Teresa", "Theo", "Timur", "Tina",
    "Uma", "Ursula", "Valentina", "Vanessa", "Vera", "Victor", "Wanda", "Wei", "Wilhelm", "Xavier", "Yara", "Yasmin",
    "Yelena", "Yohan", "Yvonne", "Zachary", "Zeynep", "Zoltan",
)  # fmt: skip
_TEST_NAMES = (
    "Sofia", "Daniel", "Amina", "Takeshi", "Carlos", "Anika", "Nils", "Zainab", "Ravi", "Clara", "Kojo", "Milan",
    "Farah", "Diego", "Naomi", "Olga", "Jamal", "Marta", "Hugo", "Xiu", "Irina", "Tobias", "Lakshmi", "Bruno",
    "Helga", "Abdul",
)  # fmt: skip

_TRAIN_ITEMS = (
    "desk lamp", "coffee mug", "yoga mat", "phone case", "garden chair", "water bottle", "wool blanket",
    "picture frame", "kitchen timer", "bike helmet", "table clock", "flower pot", "laptop sleeve", "bread knife",
    "rain jacket", "bath towel", "notebook", "travel pillow", "guitar strap", "soup bowl", "leather wallet",
    "door mat", "fishing rod", "candle holder", "baking tray", "electric kettle", "office chair", "tea pot",
    "tennis racket", "silk scarf", "board game", "tool box", "camping tent", "wine glass", "screwdriver",
    "alarm clock", "shower curtain", "backpack", "garden hose", "cutting board", "salad spinner", "wall mirror",
    "desk fan", "jigsaw puzzle", "running shirt", "cotton sheet", "memory card", "frying pan", "paint brush",
    "bird feeder", "rice cooker", "umbrella", "ink cartridge", "dinner plate", "skateboard", "wooden spoon",
    "hand mixer", "pencil case", "night light", "extension cord", "fruit crate", "linen shirt", "car charger",
    "ear plug", "marble tile", "rubber boot", "violin bow", "honey jar", "cat tunnel", "dog leash", "swim goggle",
    "copper kettle", "glass jar", "paper lantern", "sewing machine", "stapler", "trash bin", "velvet curtain",
    "window blind", "zip pouch", "bamboo tray", "chess set", "denim skirt", "egg cup", "felt slipper", "gym mat",
    "headlamp", "ironing board", "juice squeezer", "metal shelf", "nail file", "orchid pot", "padlock",
    "quilt cover", "roller skate", "tea towel", "vacuum filter", "whisk", "wooden puzzle",
    "yarn ball", "ballpoint pen", "beach umbrella", "corkscrew", "doorbell", "drawing pad", "floor lamp",
    "photo album",
)  # fmt: skip
_TEST_ITEMS = (
    "toaster", "bluetooth speaker", "sleeping bag", "ceramic vase", "computer mouse", "folding ladder",
    "hair dryer", "oven glove", "wrist watch", "storage basket", "plant stand", "keyboard", "winter hat",
    "pepper mill", "sofa cushion", "toy truck", "measuring jug", "power bank", "coat hanger", "magnifier",
    "snow shovel", "recipe book", "steel thermos", "drum stick", "bedside rug", "apron",
)  # fmt: skip
_IRREGULAR = {
    "bread knife": "bread knives", "paint brush": "paint brushes", "wine glass": "wine glasses",
    "tool box": "tool boxes", "silk scarf": "silk scarves", "metal shelf": "metal shelves",
    "wrist watch": "wrist watches",
    "computer mouse": "computer mice", "steel thermos": "steel thermoses",
}  # fmt: skip


def _with_plurals(items: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((item, _IRREGULAR.get(item, item + "s")) for item in items)


TRAIN = Phrases(_TRAIN_SENTENCES, _TRAIN_FRAMES, _TRAIN_NAMES, _with_plurals(_TRAIN_ITEMS))
TEST = Phrases(_TEST_SENTENCES, _TEST_FRAMES, _TEST_NAMES, _with_plurals(_TEST_ITEMS))
