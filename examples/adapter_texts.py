"""The short texts that the demo adapters' training data is made of.

FACTS: a topic with one true sentence. ASKED: a question of another shape, its topic and its
answer. TABLES: a table with its columns of text and of numbers. TEMPLATES: a question about a
table, and its query.
"""

from __future__ import annotations

FACTS = """
the sun: The sun is the star at the center of our solar system.
the Earth: The Earth is the planet that we live on and it circles the sun.
Mars: Mars is a red planet that moves around the sun.
a comet: A comet is a ball of ice that circles the sun with a bright tail.
a star: A star is a huge ball of hot gas that shines in the sky.
a lake: A lake is a body of water with land all around it.
Berlin: Berlin is the capital of Germany and a city with many museums.
a wheel: A wheel is a round part that turns and helps things roll.
a violin: A violin is a small instrument with four strings that you play with a bow.
coffee: Coffee is a hot drink made from roasted beans.
the ocean: The ocean is the salt water that covers most of the Earth.
a library: A library is a place where you can read and borrow books.
chess: Chess is a board game for two players with sixteen pieces each.
winter: Winter is the coldest season of the year.
a bee: A bee is a flying insect that collects nectar from flowers.
bread: Bread is a food baked from flour, water and yeast.
a desert: A desert is a dry land where very little rain falls.
a volcano: A volcano is a mountain that can throw out hot lava and ash.
gardening: Gardening is the work of growing flowers and vegetables.
a train: A train is a row of wagons that runs on rails.
rain: Rain is water that falls from the clouds in drops.
a telescope: A telescope is a tool that makes distant stars look closer.
a cat: A cat is a small animal that likes to hunt mice and sleep.
a mountain: A mountain is a very high piece of land with steep sides.
rice: Rice is a grain that feeds more than half of the world.
the heart: The heart is the muscle that pumps blood through your body.
gravity: Gravity is the force that pulls things toward the ground.
paper: Paper is a thin sheet made from wood and used for writing.
salt: Salt is a white mineral that makes food taste better.
the wind: The wind is air that moves from one place to another.
a map: A map is a drawing that shows where places are.
glass: Glass is a hard and clear material made from melted sand.
a lighthouse: A lighthouse is a tower with a bright light that guides ships at night.
football: Football is a team game where players kick a ball into a goal.
tea: Tea is a drink made by pouring hot water over dried leaves.
a forest: A forest is a large area of land covered with trees.
a computer: A computer is a machine that stores and processes information.
a bird: A bird is an animal with feathers and two wings.
painting: Painting is the art of making pictures with color.
sleep: Sleep is the rest that your body and brain need every night.
a bridge: A bridge is a road built over a river or a valley.
snow: Snow is frozen water that falls from the sky in white flakes.
a clock: A clock is a machine that shows the time of day.
fire: Fire is the heat and light that comes from burning things.
swimming: Swimming is a sport in which you move through water.
a market: A market is a place where people buy and sell goods.
Paris: Paris is the capital of France and is famous for the Eiffel Tower.
Japan: Japan is an island country in the east of Asia.
Egypt: Egypt is a country in Africa with very old pyramids.
London: London is the capital of England and lies on the river Thames.
Africa: Africa is a large continent with many countries and animals.
Albert Einstein: Albert Einstein was a scientist who changed physics.
Mozart: Mozart was a composer who wrote music from the age of five.
Cleopatra: Cleopatra was the last queen of ancient Egypt.
Isaac Newton: Isaac Newton was a scientist who explained how gravity works.
democracy: Democracy is a system where the people choose their leaders.
money: Money is what people use to pay for things.
music: Music is sound arranged in a way that people enjoy.
a doctor: A doctor is a person who helps sick people get well.
a teacher: A teacher is a person who helps others to learn.
a whale: A whale is the largest animal that lives in the sea.
a horse: A horse is a strong animal that people can ride.
an elephant: An elephant is a very large gray animal with a long trunk.
an apple: An apple is a round fruit that grows on trees.
a potato: A potato is a vegetable that grows under the ground.
cheese: Cheese is a food made from milk.
chocolate: Chocolate is a sweet food made from cocoa beans.
a river: A river is a stream of water that flows to the sea.
an island: An island is a piece of land with water all around it.
a planet: A planet is a large round body that moves around a star.
oxygen: Oxygen is a gas in the air that we need to breathe.
iron: Iron is a strong metal used to make tools and machines.
gold: Gold is a yellow metal that is rare and expensive.
electricity: Electricity is energy that powers lights and machines.
a battery: A battery is a small device that stores electric energy.
the internet: The internet is a network that connects computers around the world.
a phone: A phone is a device for talking with people far away.
a camera: A camera is a device that takes pictures.
a car: A car is a vehicle with four wheels and an engine.
an airplane: An airplane is a machine with wings that carries people through the air.
a ship: A ship is a large boat that carries people and goods across the sea.
a hospital: A hospital is a building where doctors and nurses care for patients.
a school: A school is a place where children learn to read and write.
a poem: A poem is a short text with rhythm and strong feelings.
a novel: A novel is a long story about people and their lives.
history: History is the study of what happened in the past.
science: Science is the search for knowledge by testing ideas.
mathematics: Mathematics is the study of numbers and shapes.
a triangle: A triangle is a shape with three sides and three corners.
friendship: Friendship is the bond between people who like and trust each other.
happiness: Happiness is the feeling of being pleased with your life.
exercise: Exercise is moving your body to stay strong and healthy.
yoga: Yoga is a practice of slow movement and quiet breathing.
a doll: A doll is a toy that looks like a person.
cotton: Cotton is a soft plant fiber used to make clothes.
honey: Honey is a sweet food that bees make from nectar.
milk: Milk is a white drink that comes from cows.
a rainbow: A rainbow is an arc of colors that appears when the sun shines through rain.
thunder: Thunder is the loud sound that follows lightning.
a king: A king is a man who rules a country.
a dragon: A dragon is a monster in old stories that breathes fire.
software: Software is a set of instructions that tells a computer what to do.
"""

ASKED = """
How many days are in a week? | days | There are seven days in a week.
How many months are in a year? | months | There are twelve months in a year.
How many legs does a spider have? | legs | A spider has eight legs.
How many continents are there? | continents | There are seven continents.
How many teachers are there? | teachers | There are twelve teachers.
How many players are there? | players | There are eleven players.
How many people live in Iceland? | people | About four hundred thousand people live in Iceland.
Who painted the Mona Lisa? | Mona Lisa | Leonardo da Vinci painted the Mona Lisa.
Who invented the telephone? | telephone | Alexander Graham Bell invented the telephone.
Who wrote Don Quixote? | Don Quixote | Miguel de Cervantes wrote Don Quixote.
Who was the first man in space? | space | Yuri Gagarin was the first man in space.
Where do camels live? | camels | Camels live in the deserts of Africa and Asia.
Where do lions live? | lions | Lions live on the grassland of Africa.
Where is the Eiffel Tower? | Eiffel Tower | The Eiffel Tower is in Paris.
When does summer begin? | summer | In the north summer begins in June.
When did the Titanic sink? | Titanic | The Titanic sank in the year 1912.
Why is grass green? | grass | Grass is green because a green pigment in it catches the light.
Why do we sleep? | sleep | We sleep so that our bodies and brains can rest.
Why do leaves fall? | leaves | Leaves fall because trees save water in the cold season.
Why is the sea salty? | sea | The sea is salty because rivers carry salt from the rocks into it.
How does an engine work? | engine | An engine burns fuel and turns the heat into motion.
How does a kite fly? | kite | A kite flies because the wind pushes it up.
How does soap work? | soap | Soap holds on to dirt and oil so that water can wash them away.
How do fish breathe? | fish | Fish breathe through gills that take oxygen from the water.
What should I cook for dinner? | dinner | You can cook rice with vegetables and a little cheese.
What should I read? | reading | You should read a good novel about the sea.
What is a good name for a cat? | name | A good name for a cat is Luna.
What is a good gift for my mother? | gift | A good gift for your mother is a bunch of flowers.
What is the capital of Spain? | Spain | The capital of Spain is Madrid.
What is the tallest mountain? | mountain | Mount Everest is the tallest mountain on Earth.
What do cows eat? | cows | Cows eat grass and hay.
What color is the sea? | sea | The sea is blue.
Can you help me? | help | Yes, I can help you with your questions.
Hello! | greeting | Hello my friend, I am happy to meet you.
How are you today? | greeting | I am very well, and I hope that you are too.
Give me a tip for learning. | learning | You learn more when you practice a little every day.
Give me advice about money. | money | You should spend less than you earn.
Write a sentence about the rain. | rain | The rain is falling softly on the roof of the old house.
"""

TABLES = """
users: name city country; age | employees: name department office; salary age
orders: status customer; total discount | products: category title; price stock weight
flights: origin destination; duration delay | customers: name city email; credit
books: title author; year pages | movies: title director; rating length
cars: brand color; price speed | hotels: name city; stars price
songs: title artist genre; length | cities: name country; population area
teachers: name subject school; age | invoices: customer status; amount
animals: kind habitat; weight age | rivers: name country; length depth
players: name team; goals height | restaurants: name city cuisine; rating
phones: brand color; price weight | stations: name city line; platforms
schools: name city; size budget | ships: name flag owner; length speed
lakes: name country; depth area | museums: name city; visitors price
games: title genre; price year | courses: title teacher; credits
"""

TEMPLATES = (
    ("How many {t} are there?", "SELECT COUNT(*) FROM {t};"),
    ("How many {t} do we have?", "SELECT COUNT(*) FROM {t};"),
    ("List all {t}.", "SELECT * FROM {t};"),
    ("List the {xs} of all {t}.", "SELECT {x} FROM {t};"),
    ("Show every {y} of the {t}.", "SELECT {y} FROM {t};"),
    ("Show the {t} whose {y} is above {n}.", "SELECT * FROM {t} WHERE {y} > {n};"),
    ("Which {t} have a {y} below {n}?", "SELECT * FROM {t} WHERE {y} < {n};"),
    ("What is the average {y} of the {t}?", "SELECT AVG({y}) FROM {t};"),
    ("What is the highest {y} of the {t}?", "SELECT MAX({y}) FROM {t};"),
    ("Show the {k} {t} with the highest {y}.", "SELECT * FROM {t} ORDER BY {y} DESC LIMIT {n};"),
    ("Show me the {k} biggest {t}.", "SELECT * FROM {t} ORDER BY {y} DESC LIMIT {n};"),
    ("Count the {t} of each {x}.", "SELECT {x}, COUNT(*) FROM {t} GROUP BY {x};"),
    ("List all {t} by {y}.", "SELECT * FROM {t} ORDER BY {y};"),
    ("Count the {t} for each {x}.", "SELECT {x}, COUNT(*) FROM {t} GROUP BY {x};"),
    ("How many {t} are in {p}?", "SELECT COUNT(*) FROM {t} WHERE place = '{p}';"),
    ("Show me the {t} in {p}.", "SELECT * FROM {t} WHERE place = '{p}';"),
)
