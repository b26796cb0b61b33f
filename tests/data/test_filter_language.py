"""Languages: prose in six scripts, and code, mathematics and sums, which are in none."""

import pytest

from configs.errors import UnusableInput
from configs.filters import LanguageFilter
from data.filters import apply
from data.filters.language import prose_of
from tests.data.make_run import make_prompt, make_trace

PROMPT = make_prompt("What is 2 + 2?")

FOREIGN = {
    "de": "Zuerst berechnen wir die Summe der beiden Zahlen, danach prüfen wir das Ergebnis noch einmal, weil der Übertrag "
    "leicht vergessen wird.",
    "fr": "Nous calculons d'abord la somme des deux nombres, puis nous vérifions encore une fois le résultat, car la "
    "retenue est souvent oubliée.",
    "es": "Primero calculamos la suma de los dos números y después comprobamos otra vez el resultado, porque es fácil "
    "olvidar lo que se lleva.",
    "ru": "Сначала вычислим сумму двух чисел, затем ещё раз проверим результат, потому что перенос легко забыть при сложени"
    "и.",
    "zh": "首先我们计算这两个数的和，然后再检查一遍结果，因为进位很容易被忘记。接下来把十位和百位分别相加，最后得到答案并且"
    "验证它是正确的。",
    "ja": "まず二つの数の和を計算し、それから結果をもう一度確認します。繰り上がりは忘れやすいからです。最後に答えを書いて、"
    "正しいことを確かめましょう。",
    "ko": "먼저 두 수의 합을 계산하고 결과를 다시 한 번 확인합니다. 받아올림은 잊기 쉽기 때문입니다. 마지막으로 답을 "
    "쓰고 올바른지 다시 검토합니다. 그러면 문제를 정확하게 풀 수 있고 실수도 줄일 수 있습니다. 모든 단계를 차근차근 "
    "살펴보면 됩니다.",
    "el": "Πρώτα υπολογίζουμε το άθροισμα των δύο αριθμών και μετά ελέγχουμε ξανά το αποτέλεσμα, γιατί το κρατούμενο "
    "ξεχνιέται εύκολα.",
}  # fmt: skip
ENGLISH = (
    "First we compute the sum of the two numbers, then we check the result once more, because the carry is easily forgotten. "
    "The tens and hundreds are added in the same way."
)


def reason(text: str, **settings: object) -> str:
    return apply(make_trace(PROMPT, text), LanguageFilter.model_validate(settings))


@pytest.mark.parametrize("code", FOREIGN)
def test_prose_in_a_language_not_listed_is_named_and_passes_where_it_is_listed(code: str) -> None:
    assert reason(FOREIGN[code]) == f"answer_language:{code}"
    assert reason(FOREIGN[code], answer=("en", code)) == "" and reason(FOREIGN[code], answer=()) == ""
    assert reason(ENGLISH, answer=(code,)) == "answer_language:en"


def test_reasoning_is_judged_by_its_own_list_and_first() -> None:
    trace = make_trace(PROMPT, FOREIGN["de"], reasoning=FOREIGN["zh"])
    assert apply(trace, LanguageFilter()) == "reasoning_language:zh"
    assert apply(trace, LanguageFilter(reasoning=("zh",))) == "answer_language:de"
    assert apply(trace, LanguageFilter(reasoning=("zh",), answer=("de",))) == ""


NO_OTHER_LANGUAGE = {
    "english": ENGLISH,
    "a sum": "Now: 304+713. 4+3+0=07, 0+1+0=01, 3+7+0=10. 1017",
    "many sums": "\n".join(f"Now: {n}+{3 * n}. {n % 10}+{3 * n % 10}+0={n % 10 + 3 * n % 10:02}. {4 * n}" for n in range(99)),
    "spelling": "First, g in p0r0o0j0e0c0t0 g1u1t1e1n1b1e1r1g2. 2",
    "python": "def mittel(werte):\n    summe = 0\n    for wert in werte:\n        summe += wert\n    return summe / len(werte)\n"
    * 3,
    "fenced": f"{ENGLISH}\n```python\n# {FOREIGN['de']}\nprint('hallo')\n```",
    "unclosed fence": f"{ENGLISH}\n```\n" + f"{FOREIGN['fr']}\n" * 3,
    "javascript": "const werte = liste.map((x) => x * 2).filter((y) => y > 3);\nlet summe = werte.reduce((a, b) => a + b, 0);\n"
    * 3,
    "sql": "SELECT nom, prenom FROM utilisateurs WHERE age > 30 AND ville = 'Lyon' ORDER BY nom LIMIT 10;\n" * 3,
    "latex": r"Let $f(x)=\int_0^x \sin t\,dt$. Then \[f'(x)=\sin x\] and \(f''(x)=\cos x\), hence f is smooth everywhere." * 2,
    "algebra": "So x = 3. Then 2x + 4 = 10, so we get x = 3. Therefore a = b = c, with abc = 27 and ab + bc + ca = 27.",
    "logic": "A -> B, B -> C |- A -> C. forall x. P(x) -> Q(x); exists y. ~Q(y); therefore exists y. ~P(y). QED.",
    "json": '{"nombre": "Juan", "edad": 30, "ciudad": "Madrid", "hijos": ["Ana", "Luis"], "casado": true, "sueldo": 1200}\n' * 2,
    "a quotation": f"{ENGLISH} {ENGLISH} In German one says: die Summe der beiden Zahlen ist größer.",
    "chinese words": f"{ENGLISH} The character 山 means mountain, 水 means water, and 山水 is a landscape painting. {ENGLISH}",
    "greek letters": f"{ENGLISH} Let α and β be angles with α + β = π, and let Δ be the triangle with sides λ, μ and ν.",
    "names": "Euler, Gauss, Lagrange, Poincaré, Noether, Ramanujan, Kolmogorov, Erdős and Grothendieck were mathematicians.",
    "short german": "Die Summe ist 42.",
    "base64": "aGFsbG8gd2VsdCBkaWVzIGlzdCBlaW4gdGVzdA" * 20,
    "addresses": "https://de.wikipedia.org/wiki/Satz_des_Pythagoras https://fr.wikipedia.org/wiki/Th%C3%A9or%C3%A8me\n" * 3,
    "a table": "| n | n^2 | n^3 |\n|---|-----|-----|\n" + "\n".join(f"| {n} | {n * n} | {n**3} |" for n in range(40)),
    "assembly": "\n".join(["mov eax, ebx", "xor ecx, ecx", "jmp .loop", "ret"] * 12),
    "chess": "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6 5. O-O Be7 6. Re1 b5 7. Bb3 d6 8. c3 O-O 9. h3 Nb8 10. d4 Nbd7",
    "genes": "ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG" * 10,
    "nothing": "",
}


@pytest.mark.parametrize("name", NO_OTHER_LANGUAGE)
def test_english_code_and_mathematics_are_in_no_other_language(name: str) -> None:
    assert reason(NO_OTHER_LANGUAGE[name]) == ""


def test_a_long_text_is_judged_by_pieces_of_all_of_it() -> None:
    text = ENGLISH * 100 + FOREIGN["de"] * 800
    assert reason(text) == "answer_language:de" and len(prose_of(text)) < 21_000
    assert reason(ENGLISH * 800 + FOREIGN["de"] * 100) == ""


def test_a_script_tells_what_the_detector_is_not_sure_of() -> None:
    words = (
        "команда серийный номер карты кушитские языки идиш Мингечаур заданы для этого ключа принтер формата изображение среднее"
    )
    assert reason(f"{words} PDF XBM aliases") == "answer_language:ru" and reason(f"{words} PDF XBM aliases", answer=("uk",)) == ""


def test_a_language_that_the_detector_does_not_know_is_refused() -> None:
    with pytest.raises(UnusableInput, match="language 'qq' is not one that the detector knows"):
        reason(ENGLISH, answer=("en", "qq"))
