"""Words of the simulator: topics with their products, and what its scenarios are called."""

# Topic: adjectives, products, features; a title is "Adjective product with feature".
TOPICS = {
    "Hiking and camping": (
        "Ultralight,Waterproof,Rugged,Windproof,Foldable,Alpine",
        "two-person tent,sleeping bag,trail camera,hiking backpack,camp stove,headlamp,"
        "trekking poles,hammock",
        "trail map,mosquito net,carabiner set,rain cover,tent pegs,solar lantern",
    ),
    "Cooking": (
        "Cast iron,Nonstick,Stainless,Enamelled,Copper,Heavy-duty",
        "skillet,stock pot,chef's knife,baking tray,pressure cooker,wok,pasta machine,stand mixer",
        "recipe booklet,oven mitts,wooden spatula,spice rack,measuring cups,glass lid",
    ),
    "Music making": (
        "Acoustic,Electric,Vintage,Handmade,Concert,Semi-hollow",
        "guitar,violin,stage piano,drum kit,ukulele,trumpet,synthesizer,bass amplifier",
        "tuning pegs,sheet music,sustain pedal,spare strings,metronome,drumsticks",
    ),
    "Gardening": (
        "Organic,Hardy,Raised,Galvanised,Drought-proof,Cottage",
        "tomato seedlings,watering can,rose bush,compost bin,pruning shears,greenhouse,wheelbarrow,"
        "herb planter",
        "potting soil,garden gloves,flower seeds,drip hose,plant labels,slug fence",
    ),
    "Video games": (
        "Multiplayer,Retro,Open-world,Wireless,Turn-based,Esports",
        "role-playing game,racing simulator,game controller,console bundle,space shooter,puzzle platformer,"
        "gaming headset,arcade cabinet",
        "bonus levels,season pass,joystick,co-op mode,boss battles,collector's figurine",
    ),
    "Babies and toddlers": (
        "Soft,Washable,Breathable,Gentle,Convertible,Hypoallergenic",
        "stroller,baby carrier,diaper pack,cot mattress,baby monitor,high chair,teething ring,night light",
        "nursery rhymes,changing mat,pacifier,baby bottle,bib set,lullaby player",
    ),
    "Cars and garage": (
        "Heated,Hydraulic,Cordless,High-torque,Turbo,All-season",
        "car battery,tyre set,dash camera,engine oil,floor jack,roof rack,brake pads,jump starter",
        "wheel nuts,seat covers,exhaust clamp,spark plugs,windscreen wipers,socket wrench",
    ),
    "Fitness": (
        "Adjustable,Compact,Competition,Non-slip,Anti-sweat,Magnetic",
        "dumbbell set,yoga mat,rowing machine,kettlebell,exercise bike,treadmill,pull-up bar,protein shake",
        "workout plan,heart-rate strap,resistance bands,gym towel,foam roller,shaker bottle",
    ),
    "History books": (
        "Illustrated,Abridged,Annotated,Definitive,Concise,Award-winning",
        "Roman empire chronicle,medieval atlas,war memoir,Viking saga,biography of a queen,Silk Road history,"
        "archaeology guide,revolution reader",
        "battle maps,archive photographs,royal family tree,timeline poster,letters of soldiers,museum notes",
    ),
    "Beauty and skin care": (
        "Hydrating,Fragrance-free,Matte,Nourishing,Anti-ageing,Vegan",
        "face cream,lipstick,shampoo,eyeshadow palette,sunscreen lotion,perfume,nail polish,clay mask",
        "aloe extract,make-up brush,vitamin serum,rose oil,beauty mirror,cotton pads",
    ),
    "Pets": (
        "Chew-proof,Grain-free,Plush,Washable,Orthopaedic,Interactive",
        "dog bed,cat scratching post,aquarium,bird cage,dog leash,cat litter,hamster wheel,puppy food",
        "squeaky toy,catnip,pet treats,grooming comb,feeding bowl,name tag",
    ),
    "Computers and networks": (
        "Quad-core,Mechanical,Ultrawide,Fast,Encrypted,Rack-mount",
        "laptop,keyboard,monitor,solid-state drive,wireless router,graphics card,network switch,web server",
        "USB cable,cooling fan,backup software,fibre adapter,firewall licence,memory module",
    ),
}

SCENARIO_TEXTS = (
    ("Home feed", "The endless feed of the start page. People browse without a goal."),
    ("Search", "Results of a search. People came with something definite in mind."),
    ("Gift finder", "A page of gift ideas. People choose for somebody else."),
    ("Deals", "Time-limited discounts. People hunt for bargains."),
    ("Newsletter", "A weekly e-mail with a few picks. People glance at it in between."),
    ("Checkout", "Additions shown beside the cart. People are about to pay."),
    ("New arrivals", "What came in this week. People like to be first."),
    ("Video", "Short product videos. People watch more than they buy."),
)
