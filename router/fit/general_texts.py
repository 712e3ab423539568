"""What people type into any assistant: texts that a pool of specialists is mostly not for.

A fit holds the pool's own texts against them, so that "what is the capital of ..." does not go to the expert
whose texts ask for capitals in the rows of a table. They were written for this project.
"""

from ..encoder import Encoder
from ..router import Vectors, blank_rows

GENERAL_TEXTS = tuple(
    line.strip()
    for line in """
What is the tallest building in the world?
Who painted the Mona Lisa?
Tell me something funny.
Good evening!
Hola, ¿qué tal?
Write a short story about a dragon.
How do I cook rice?
Who is the president of Brazil?
Why do people dream?
Translate this sentence into Spanish.
How far away is the moon?
What is the population of Canada?
How are you today?
What will the weather be like tomorrow?
Give me a recipe for pancakes.
Which language is spoken in Austria?
When did the second world war end?
Suggest a name for my cat.
Summarise this article for me.
What should I watch tonight?
Explain gravity to a child.
Write an email to my landlord about the heating.
Plan a trip to Japan for ten days.
What is happiness?
Is coffee healthy?
Compose a haiku about autumn.
What day is it today?
Can you help me?
ok
yes please
What's your name?
Who are you and what can you do?
How old is the universe?
What is the largest ocean on earth?
Name three rivers in Africa.
What is the currency of Sweden?
Write a birthday message for my mother.
Correct the grammar of this sentence.
Rewrite this paragraph more politely.
Which football team is the best?
How do I learn to play the guitar?
Why is the sky blue?
What are the primary colours?
Describe a sunset over the sea.
Give me ideas for dinner with friends.
How do I tie a tie?
What is democracy?
Who discovered penicillin?
List the planets of the solar system.
What are the benefits of exercise?
I feel a bit sad today.
Let's talk about something else.
What do you think of modern art?
Make a shopping list for a week.
How do I get a stain out of a shirt?
What is the difference between a frog and a toad?
Tell me about the history of Rome.
Who was Napoleon?
What is the best way to learn a language?
How long does it take to fly to Australia?
Invent a slogan for a bakery.
What rhymes with orange?
Give me advice for a job interview.
Write a poem about my grandmother.
Is there life on Mars?
How do birds find their way?
What is the highest mountain in Europe?
Which is the longest river in South America?
What is the meaning of the word ephemeral?
Continue the story.
Tell me more about that.
Thank you very much!
Sorry, I do not understand.
What are you doing this weekend?
Recommend a book for the holidays.
How do I keep a houseplant alive?
Pretend to be a pirate.
What happened in 1989?
When is Easter this year?
What is a black hole?
What is the capital of Norway?
Capital of Thailand
Which city is the capital of Egypt?
How many people live in Berlin?
Where is Machu Picchu?
In which country is Mount Kilimanjaro?
What is the official language of Switzerland?
How tall is the Statue of Liberty?
When was the Berlin wall built?
Who was the first person in space?
Who is the king of Spain?
What year did the Titanic sink?
How many continents are there?
What is the most spoken language in the world?
Which planet is the hottest?
How deep is the Pacific Ocean?
What is the national flower of India?
Who invented the light bulb?
Where do penguins live?
What is the coldest place on earth?
How many states does Germany have?
What time zone is New York in?
Who is the author of War and Peace?
How many strings does a violin have?
What is the largest city in Turkey?
Which continent is Peru in?
What money do they use in Denmark?
What is the area of Iceland?
Who won the last world cup?
What do people eat in Vietnam?
Je voudrais réserver une table pour deux.
Quelle heure est-il ?
Wie wird das Wetter morgen?
Erzähl mir einen Witz.
Come si dice grazie in inglese?
Qual é a sua cor favorita?
Как дела? Расскажи мне сказку.
Сколько лет Москве?
今晚吃什么好？
请给我讲一个故事。
今日はいい天気ですね。
おすすめの映画は何ですか？
오늘 기분이 어때요?
ما هو أطول نهر في العالم؟
आज आप कैसे हैं?
Bugün hava nasıl?
""".strip().splitlines()
)


def general_vectors(encoder: Encoder) -> Vectors:
    """Unit vectors [b, d] of those texts that the encoder can read."""
    vectors = encoder.encode(GENERAL_TEXTS).vectors
    return vectors[~blank_rows(vectors)]
