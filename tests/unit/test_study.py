"""A blind study without its drawing: order and sides, votes, results, and what the page lets through."""

import io
import re
import threading

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from raysd.database import Database
from raysd.errors import NotFound, RequestError
from raysd.storage import Storage
from raysd.study import draw as study_draw
from raysd.study import studies
from raysd.study.host import listen_to_reviewers
from raysd.study.page import of_study
from raysd.study.results import krippendorff_alpha, results, table
from raysd.study.tables import Pair, Study
from raysd.study.votes import Ballot, Shown, order
from tests.studies import made, opened, plan

MARKUP = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
SERVED = "http://127.0.0.1:8010"


def pair_of(number):
    return Pair(
        id=number + 1, number=number, token=f"t{number}", first_picture=f"a{number}", second_picture=f"b{number}"
    )


def sides(reviewer, count, key="key"):
    return {s.pair.number: s.left for s in order(Study(key=key), [pair_of(n) for n in range(count)], reviewer)}


def numbers(reviewer, count, key="key"):
    return [s.pair.number for s in order(Study(key=key), [pair_of(n) for n in range(count)], reviewer)]


@pytest.fixture
def ballot(tmp_path):
    study, pairs = made(tmp_path, plan(count=8))
    return Ballot(opened(tmp_path)[1], study, pairs)


@pytest.fixture
def client(tmp_path):
    made(tmp_path, plan(count=3, prompts=(MARKUP,)))
    storage, database = opened(tmp_path)
    return TestClient(of_study(database, storage, "one"), base_url=SERVED)


# Order and sides


def test_the_order_is_the_reviewers_own_and_always_the_same():
    # As computed once: if this changes, reviewers in the middle of a study see other sides than they voted on.
    assert numbers("Bert", 8) == [2, 3, 1, 0, 5, 7, 6, 4]
    assert "".join(sides("Bert", 8)[n][0] for n in range(8)) == "ffssssff"
    assert numbers("anna", 8) == numbers("Anna", 8)
    assert numbers("Bert", 8) != numbers("Anna", 8)
    assert numbers("Anna", 8, key="other") != numbers("Anna", 8)
    assert sorted(numbers("Anna", 500)) == list(range(500))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 101])
def test_each_version_is_on_the_left_in_half_of_the_pairs(count):
    odd = set()
    for person in range(40):
        left = list(sides(f"r{person}", count).values())
        assert abs(left.count("first") - left.count("second")) == count % 2
        odd.add(left.count("first") > left.count("second"))
    assert odd == ({True, False} if count % 2 else {False})


def test_sides_are_independent_of_the_pair_and_of_its_place():
    """Over 400 reviewers a pair is on the left, and comes in the first half, in half the cases: 5 standard deviations."""
    people = [f"r{n}" for n in range(400)]
    for number in range(10):
        assert abs(sum(sides(p, 10)[number] == "first" for p in people) - 200) < 50
        assert abs(sum(numbers(p, 10).index(number) < 5 for p in people) - 200) < 50
    early = sum(sides(p, 10)[n] == "first" for p in people for n in numbers(p, 10)[:5])
    assert abs(early - 1000) < 112


def test_an_answer_by_side_speaks_for_the_version_there():
    for left, right in (("first", "second"), ("second", "first")):
        shown = Shown(pair_of(0), left)
        assert (shown.meant("left"), shown.meant("right"), shown.meant("tie")) == (left, right, "tie")
        assert (shown.left_picture, shown.right_picture) == (("a0", "b0") if left == "first" else ("b0", "a0"))


# Votes


def choices(ballot):
    body = results(ballot.database, "one")
    return [(row["first"], row["second"], row["ties"]) for row in body["reviewers"]]


def test_a_vote_moves_on_and_undo_goes_back(ballot):
    start = ballot.turn("Anna")
    assert (len(start.left), start.done, start.of) == (8, 0, 8)
    ballot.undo("Anna")  # nothing to undo
    for expected in (1, 2):
        ballot.vote("Anna", ballot.turn("Anna").left[0].pair.token, "tie")
        assert ballot.turn("Anna").done == expected
    assert ballot.turn("Anna").left == start.left[2:]
    ballot.undo("Anna")
    assert ballot.turn("Anna").left == start.left[1:]
    assert ballot.turn("Bert").done == 0


def test_a_second_vote_for_a_pair_replaces_the_first(ballot):
    shown = ballot.turn("Anna").left[0]
    ballot.vote("Anna", shown.pair.token, "tie")
    assert choices(ballot) == [(0, 0, 1)]
    ballot.vote("Anna", shown.pair.token, "left")
    assert choices(ballot) == [(1, 0, 0) if shown.left == "first" else (0, 1, 0)]


def test_votes_of_another_study_do_not_count(ballot, tmp_path):
    _, others = made(tmp_path, plan(count=4), "two")
    with pytest.raises(RequestError, match="no such pair in this study"):
        ballot.vote("Anna", others[0].token, "left")
    ballot.vote("Anna", ballot.pairs[0].token, "left")
    assert results(ballot.database, "two")["votes"] == 0
    assert Ballot(ballot.database, *studies.find(ballot.database, "two")).turn("Anna").done == 0


def test_a_reviewer_is_known_by_the_name_first_written(ballot):
    assert ballot.known_as("  Änna \t B ") == "Änna B"
    ballot.vote("Änna B", ballot.pairs[0].token, "tie")
    assert ballot.known_as("änna b") == "Änna B"
    assert ballot.known_as("A\u0308NNA B") == "Änna B"
    for name in ("", "  ", "x" * 61, "a\x00b", "a\x1b[2Jb", "\u202eanna"):
        with pytest.raises(RequestError, match="1 to 60 printable characters"):
            ballot.known_as(name)


def test_two_spellings_whose_first_answers_come_together_are_one_reviewer(ballot):
    """Neither was known when both were asked for."""
    for place, spelling in enumerate(("T1", "t1", "T1")):
        ballot.vote(spelling, ballot.pairs[place].token, "tie")
    assert [(row["reviewer"], row["votes"]) for row in results(ballot.database, "one")["reviewers"]] == [("T1", 3)]


def test_the_same_on_postgresql(postgres, tmp_path):
    """Made by two at once, voted on twice, undone, summed up."""
    database = Database(postgres.url(), Storage(str(tmp_path)))
    database.migrate()
    found = []
    makers = [threading.Thread(target=lambda: found.append(studies.create(database, plan(), "one"))) for _ in range(6)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len({tuple(pair.token for pair in pairs) for _, pairs in found}) == 1
    assert len(found) == 6
    ballot = Ballot(database, *found[0])
    for answer in ("left", "tie"):
        ballot.vote("Änna", ballot.pairs[0].token, answer)
    ballot.vote("Änna", ballot.turn("Änna").left[0].pair.token, "right")
    ballot.undo("Änna")
    assert ballot.known_as("änna") == "Änna"
    assert results(database, "one")["votes"] == ballot.turn("Änna").done == 1
    token = ballot.pairs[0].token
    voters = [threading.Thread(target=ballot.vote, args=(name, token, "tie")) for name in ("T1", "t1", "T1", "t1")]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert len(results(database, "one")["reviewers"]) == 2
    database.close()


# Results


def test_alpha_by_hand():
    # Values a 3, b 3 of n = 6; one pair disagrees, o_ab = o_ba = 1: 1 - 5 * 2 / (9 + 9).
    assert krippendorff_alpha(["aa", "ab", "bb"]) == pytest.approx(1 - 10 / 18)
    assert krippendorff_alpha(["aa", "bb", "c"]) == 1
    assert krippendorff_alpha(["ab", "ba"]) == pytest.approx(-0.5)


def test_alpha_of_the_examples_in_krippendorffs_paper():
    two = ("0100000010", "1110010000")
    assert krippendorff_alpha(zip(*two, strict=True)) == pytest.approx(0.095, abs=5e-4)
    four = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = ["".join(unit).replace(".", "") for unit in zip(*four, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


@pytest.mark.parametrize("units", [[], ["a", "b"], ["aa", "aa"]])
def test_alpha_that_is_undefined_is_none(units):
    assert krippendorff_alpha(units) is None


def test_results_by_hand(ballot):
    """Anna: first 3, second 1, tie 2. Bert judges two of the same pairs: one as Anna does, one not."""
    wanted = ["first", "first", "first", "second", "tie", "tie"]
    for reviewer, said in (("Anna", wanted), ("Bert", ["first", "second"])):
        shown = {s.pair.number: s for s in order(ballot.study, ballot.pairs, reviewer)}
        for number, choice in enumerate(said):
            side = "tie" if choice == "tie" else "left" if shown[number].left == choice else "right"
            ballot.vote(reviewer, shown[number].pair.token, side)
    body = results(ballot.database, "one")
    assert (body["pairs"], body["votes"], body["ties"]) == (8, 8, 2)
    first, second = body["versions"]
    assert (first["ref"], first["wins"], first["losses"], first["ties"], first["win_rate"]) == (
        "tabby@3",
        4,
        2,
        2,
        0.625,
    )
    assert (second["ref"], second["wins"], second["losses"], second["ties"], second["win_rate"]) == (
        "tabby@4", 2, 4, 2, 0.375,
    )  # fmt: skip
    assert first["interval"] == pytest.approx([0.30574, 0.86315], abs=1e-5)
    assert second["interval"] == pytest.approx([1 - 0.86315, 1 - 0.30574], abs=1e-5)
    assert [(r["reviewer"], r["votes"], r["first"], r["second"], r["ties"]) for r in body["reviewers"]] == [
        ("Anna", 6, 3, 1, 2),
        ("Bert", 2, 1, 1, 0),
    ]
    # Pairs 0 (first, first) and 1 (first, second): n = 4, 3 first and 1 second, 1 - 3 * 2 / (3 + 3).
    assert body["agreement"] == {"alpha": 0.0, "pairs": 2}


def test_results_without_votes_are_none(ballot):
    body = results(ballot.database, "one")
    assert [(row["win_rate"], row["interval"]) for row in body["versions"]] == [(None, None)] * 2
    assert body["agreement"] == {"alpha": None, "pairs": 0}
    assert "undefined" in shown_of(body)


def test_the_rate_of_the_left_side_shows_who_does_not_look(ballot):
    while ballot.turn("Anna").left:
        ballot.vote("Anna", ballot.turn("Anna").left[0].pair.token, "left")
    body = results(ballot.database, "one")
    assert body["reviewers"][0]["left_rate"] == 1.0
    assert [row["win_rate"] for row in body["versions"]] == [0.5, 0.5]


def test_names_are_text_in_the_terminal(ballot):
    ballot.vote("[red]x[/nonsense]", ballot.pairs[0].token, "tie")
    assert "[red]x[/nonsense]" in shown_of(results(ballot.database, "one"))


def shown_of(body):
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    console.print(table(body))
    return console.file.getvalue()


# Making a study


def test_the_same_plan_is_the_same_study_and_another_is_refused(tmp_path):
    database = opened(tmp_path)[1]
    study, pairs = studies.create(database, plan())
    again, same = studies.create(database, plan(first_ref="tabby:production"))
    assert (again.id, [pair.token for pair in same]) == (study.id, [pair.token for pair in pairs])
    assert [(pair.prompt, pair.seed) for pair in pairs[:3]] == [("a cat", 0), ("a dog", 1), ("a cat", 2)]
    assert re.fullmatch("study-[0-9a-f]{8}", study.name)
    for change in ({"count": 9}, {"steps": 3}, {"guidance": 1.0}, {"first_digest": "3" * 64}, {"prompts": ("x",)}):
        with pytest.raises(RequestError, match="exists with other versions, prompts or settings"):
            studies.create(database, plan(**change), study.name)
    with pytest.raises(RequestError, match="--name 'No Good'"):
        studies.create(database, plan(), "No Good")
    with pytest.raises(NotFound, match=rf"study absent: not in .*raysd\.db; there are: {study.name}"):
        studies.find(database, "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 prompts in it"),
        (b"\n \n", "0 prompts in it"),
        (b"fine\n\xff\xfe", "not a readable UTF-8 file"),
        (b"fine\n\n" + b"x" * 2001, "line 3: prompt: at most 2,000 characters"),
        (b"fine\na\x00b", "line 2: .*no NUL"),
    ],
)
def test_prompts_that_are_refused(content, message, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        studies.prompts_of(tmp_path / "prompts.txt")
    with pytest.raises(NotFound, match="no such file"):
        studies.prompts_of(tmp_path / "absent.txt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "negative": "b"}')
    with pytest.raises(RequestError, match="without negative prompts"):
        studies.prompts_of(tmp_path / "prompts.jsonl")


def test_drawing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    storage, database = opened(tmp_path)
    study, pairs = studies.create(database, plan(count=20), "one")
    asked, limit = [], [10]

    def fake(located, requests, progress):
        if len(asked) >= limit[0]:
            raise KeyboardInterrupt
        progress(sum(request.steps for request in requests), 0)
        asked.extend((located, request.prompt, request.seed) for request in requests)
        return [Image.new("RGB", (64, 64), (request.seed, 0, 0)) for request in requests]

    monkeypatch.setattr(study_draw, "draw", fake)
    with pytest.raises(KeyboardInterrupt):
        study_draw.draw_study(study, pairs, "A", "B", storage)
    with pytest.raises(RequestError, match="of 40 pictures are drawn"):
        of_study(database, storage, "one")
    counts, limit[0] = [], 1000
    study_draw.draw_study(study, pairs, "A", "B", storage, lambda done, of: counts.append((done, of)))
    assert len(asked) == 40
    assert counts[-1][0] == counts[-1][1] < 40 * study.steps
    assert set(asked) == {(by, pair.prompt, pair.seed) for by in "AB" for pair in pairs}
    assert study_draw.draw_study(study, pairs, "A", "B", storage) == 0
    of_study(database, storage, "one")


def test_versions_that_draw_in_different_sizes_are_refused_after_one_picture(tmp_path, monkeypatch):
    storage, database = opened(tmp_path)
    study, pairs = studies.create(database, plan(count=20), "one")
    sizes = {"A": 64, "B": 128}

    class Named(str):
        ref = property(lambda self: f"model {self}")

    monkeypatch.setattr(
        study_draw, "draw", lambda by, requests, step: [Image.new("RGB", (sizes[by],) * 2) for _ in requests]
    )
    for _ in range(2):
        with pytest.raises(RequestError, match="model B: draws 128x128, the other version 64x64"):
            study_draw.draw_study(study, pairs, Named("A"), Named("B"), storage)
        assert len(studies.drawn(storage, study)) == 1


def test_pictures_hold_pixels_and_nothing_else():
    image = Image.new("RGBA", (5, 4), (1, 2, 3, 255))
    body, info = io.BytesIO(), PngInfo()
    info.add_text("raysd", "tabby@3")
    image.save(body, "PNG", pnginfo=info, dpi=(72, 72), icc_profile=b"tabby")
    plain = study_draw.plain_png(Image.open(body))
    assert re.findall(rb"(IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|iCCP|pHYs|tIME|tabby)", plain) == [
        b"IHDR",
        b"IDAT",
        b"IEND",
    ]
    assert Image.open(io.BytesIO(plain)).getpixel((4, 3)) == (1, 2, 3)


# The page


def test_markup_in_captions_and_names_is_escaped(client):
    client.post("/reviewer", data={"name": "<i>Anna</i>"})
    page = client.get("/").text
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert" in page
    assert "{{ 7 * 7 }}" in page
    assert "&lt;i&gt;Anna" in page


def test_the_policy_lets_nothing_in_from_elsewhere(client):
    seen = set()
    for _ in range(2):
        answer = client.get("/")
        policy = answer.headers["Content-Security-Policy"]
        nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
        assert f'<script nonce="{nonce}">' in answer.text
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        seen.add(nonce)
    assert len(seen) == 2
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", answer.text)
    assert not re.search(r"\s(?:style|on\w+)=", re.sub(r"&lt;.*?&gt;", "", answer.text))


def test_votes_by_form(client, tmp_path):
    assert client.post("/vote", data={"pair": "x", "answer": "left"}).status_code == 400
    client.post("/reviewer", data={"name": "Anna"})
    page = client.get("/").text
    token, anna = token_of(page), {"reviewer": "Anna"}
    assert "0 of 3" in page
    for form, status in (
        ({"pair": token, "answer": "first"}, 400),
        ({"pair": "nothing", "answer": "left"}, 400),
        ({"answer": "left"}, 400),
        ({"pair": "x" * 5000, "answer": "left"}, 413),
    ):
        assert client.post("/vote", data={**form, **anna}).status_code == status
    assert client.post("/vote", content=b"\xff\xfe").status_code == 400
    assert client.post("/reviewer", data={"name": "a\x00b"}).status_code == 400
    assert results(opened(tmp_path)[1], "one")["votes"] == 0
    assert "1 of 3" in client.post("/vote", data={"pair": token, "answer": "left", **anna}).text
    assert "0 of 3" in client.post("/undo", data=anna).text
    assert 'name="name"' in client.post("/leave").text


def token_of(page):
    return re.search(r'name="pair" value="(\w+)"', page)[1]


def test_a_page_that_was_shown_to_another_reviewer_is_not_answered_for_this_one(client, tmp_path):
    """Two people in one browser: on the page that is still open the sides are the first one's."""
    client.post("/reviewer", data={"name": "Anna"})
    page = client.get("/").text
    form = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    assert form == {"pair": token_of(page), "reviewer": "Anna"}
    client.post("/vote", data={**form, "answer": "tie"})
    client.post("/leave")
    client.post("/reviewer", data={"name": "Bert"})
    for path in ("/vote", "/undo"):
        for shown_to in (form, {"pair": form["pair"]}):
            answer = client.post(path, data={**shown_to, "answer": "left"})
            assert (answer.status_code, "reload the page" in answer.text) == (400, True)
    assert results(opened(tmp_path)[1], "one")["votes"] == 1
    client.post("/reviewer", data={"name": "aNNa"})
    assert client.post("/undo", data={"reviewer": "aNNa"}).status_code == 200, "the same person"


def test_a_cookie_that_is_no_name_is_nobody(client):
    client.cookies.set("raysd_reviewer", "a%00b")
    assert 'name="name"' in client.get("/").text
    assert client.post("/undo").status_code == 400


def test_only_pictures_of_the_study_are_given_out(client, tmp_path):
    _, pairs = studies.find(opened(tmp_path)[1], "one")
    answer = client.get(f"/pictures/{pairs[0].first_picture}.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    for path in ("/pictures/absent.png", "/pictures/..%2f..%2fraysd.db", "/pictures/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 404


def test_a_foreign_host_name_is_refused_unless_public(tmp_path):
    made(tmp_path, plan(count=1))
    storage, database = opened(tmp_path)
    for public, status in ((False, 421), (True, 200)):
        served = TestClient(of_study(database, storage, "one", public=public), base_url="http://evil.example")
        assert served.get("/").status_code == status
    local = TestClient(of_study(database, storage, "one"), base_url=SERVED)
    for host, status in (("127.0.0.1.evil.example", 421), ("localhost:8010", 200), ("[::1]:8010", 200)):
        assert local.get("/", headers={"Host": host}).status_code == status


def test_forms_of_other_sites_are_refused(client):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        assert client.post("/reviewer", data={"name": "Anna"}, headers={"Sec-Fetch-Site": site}).status_code == status


def test_a_database_that_fails_is_said_to_the_reviewer(client, monkeypatch):
    client.post("/reviewer", data={"name": "Anna"})
    token = token_of(client.get("/").text)
    monkeypatch.setattr("raysd.study.votes.upsert", fails)
    answer = client.post("/vote", data={"pair": token, "answer": "left", "reviewer": "Anna"})
    assert (answer.status_code, "try again" in answer.text) == (503, True)


def fails(*_):
    from sqlalchemy.exc import OperationalError

    raise OperationalError("x", {}, Exception("disk full"))


def test_others_are_refused_unless_public():
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.org"):
        with pytest.raises(RequestError, match=r"the page knows no logins.*--public"):
            listen_to_reviewers(host, 0)
    with listen_to_reviewers("127.0.0.1", 0), listen_to_reviewers("0.0.0.0", 0, public=True):
        pass
