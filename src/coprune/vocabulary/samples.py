"""Short sample texts, to measure the cost of a cut for a language or code without a user's text."""

LANGUAGES = {
    "en": (
        "The ferry had left before dawn, so we walked along the harbour and waited for the café to open. "
        "“You’re early,” said the owner – she’d hardly slept – “but the bread is warm.” By noon the wind had "
        "turned; fishermen mended nets, children counted gulls, and nobody asked why the lighthouse, painted "
        "white in 1894, had been dark for three nights."
    ),
    "de": (
        "Als die Bäckerin um fünf Uhr die Tür aufschloss, lag noch Nebel über den Gärten. „Heute wird es "
        "heiß“, sagte ihr Nachbar und schob das Fahrrad über die Straße. Später kamen Schüler, kauften "
        "Brötchen und stritten darüber, ob man für die Prüfung wirklich alle Formeln auswendig können müsse. "
        "Niemand bemerkte, dass die Kirchturmuhr seit gestern stand."
    ),
    "fr": (
        "Le marché s’installe chaque samedi sur la place, entre la vieille fontaine et l’école. On y trouve "
        "des pêches, du fromage de chèvre et, parfois, un violoniste qui joue sans regarder personne. « Vous "
        "reviendrez demain ? » demanda la vendeuse. Il n’était pas sûr ; la neige pouvait fermer la route, et "
        "son frère l’attendait déjà depuis deux jours."
    ),
    "es": (
        "La abuela guardaba las cartas en una caja de madera, debajo de la ventana. Cada domingo leía una en "
        "voz alta, aunque todos conocíamos ya las palabras. ¿Quién era aquel hombre que prometía volver en "
        "otoño? Nunca lo supimos; el río creció, el pueblo cambió de nombre y los años pasaron más rápido de "
        "lo que nadie había imaginado."
    ),
    "it": (
        "Il treno delle sette era in ritardo, come sempre quando piove. Nella sala d’attesa un bambino "
        "disegnava montagne sul vetro e sua madre gli spiegava perché i fiumi non dormono mai. Poi arrivò il "
        "capostazione: «Oggi si viaggia in autobus», disse. Nessuno protestò; qualcuno aprì un giornale, e la "
        "città cominciò lentamente a svegliarsi."
    ),
    "pt": (
        "Naquela manhã o professor trouxe para a aula uma caixa cheia de conchas e pediu que cada aluno "
        "escolhesse uma. Não era um jogo: quem descrevesse melhor a sua poderia levá-la para casa. Lá fora, os "
        "pescadores já voltavam com as redes vazias. Ninguém sabia explicar por que razão o mar estava tão "
        "calmo desde o fim de semana."
    ),
    "nl": (
        "Toen de brug eindelijk openging, stonden er al veertig fietsers te wachten. Een oude man vertelde dat "
        "hij hier als jongen had leren zwemmen, nog voordat de fabriek werd gebouwd. Niemand geloofde hem, "
        "want het water zag er grijs en koud uit. Toch bleef hij lachen en wees naar de overkant, waar de "
        "eerste bootjes weer vertrokken."
    ),
    "pl": (
        "Wieczorem zgasło światło w całej dzielnicy, więc sąsiedzi wyszli na schody ze świecami. Ktoś "
        "przyniósł gitarę, ktoś inny ciasto ze śliwkami. Przez chwilę rozmawiali tak, jakby znali się od lat, "
        "chociaż wcześniej mówili sobie tylko „dzień dobry”. Gdy prąd wrócił, nikt nie spieszył się do "
        "mieszkania."
    ),
    "ru": (
        "Утром над рекой стоял такой густой туман, что паромщик отказался выходить. Пассажиры пили чай в "
        "маленькой комнате и спорили о погоде. Девочка с красным рюкзаком читала вслух рассказ про медведя, "
        "который научился считать звёзды. К полудню солнце наконец появилось, и все сразу забыли, о чём "
        "говорили."
    ),
    "tr": (
        "Köyün girişindeki çınarın altında her akşam aynı üç kişi otururdu. Biri eski bir öğretmen, biri "
        "balıkçı, üçüncüsü de hiç konuşmayan bir saatçiydi. Yağmur başladığında bile yerlerinden kalkmazlardı. "
        "Çocuklar onların ne beklediğini merak eder, ama sormaya cesaret edemezdi; çünkü cevabı duymak "
        "istemiyorlardı."
    ),
    "ar": (
        "في الصباح الباكر فتح البائع دكانه الصغير قرب الميناء ورتب الكتب القديمة على الرفوف. جاء طالب يسأل عن "
        "قاموس، ثم جلست امرأة تقرأ قصة قصيرة حتى الظهر. قال البائع إن البحر سيكون هادئا غدا، لكن أحدا لم يصدقه "
        "لأن الريح كانت قد بدأت تعلو."
    ),
    "hi": (
        "गाँव के स्कूल में आज कोई घंटी नहीं बजी, क्योंकि घड़ी रात में बंद हो गई थी। बच्चे फिर भी समय पर आए और "
        "बरामदे में बैठकर कहानियाँ सुनाने लगे। शिक्षिका ने मुस्कुराकर कहा कि सीखने के लिए घंटी की ज़रूरत नहीं "
        "होती। दोपहर तक बादल छँट गए और सब लोग नदी की ओर चल पड़े।"
    ),
    "zh": (
        "清晨的市场刚刚开门，卖豆腐的老人已经把木桌擦得干干净净。一个学生停下自行车，问他昨天为什么没有来。老人"
        "笑着说，孙女在城里找到了工作，全家人一起吃了一顿饭。远处传来火车的声音，街上的灯一盏一盏地熄灭了。"
    ),
    "ja": (
        "駅前の小さな本屋は、雨の日だけ遅くまで開いている。店主は棚の奥から古い地図を取り出し、子どもたちに昔の"
        "川の流れを見せてくれた。「ここには橋が二つあったんだよ」と彼は言った。外では傘をさした人々が、静かに電"
        "車を待っていた。"
    ),
    "ko": (
        "할머니는 해마다 봄이 오면 마당에 작은 씨앗을 심으셨다. 우리는 그 꽃이 언제 필지 내기를 하곤 했다. "
        "어느 날 낯선 사람이 찾아와 우물이 어디 있느냐고 물었고, 할머니는 아무 말 없이 차를 내오셨다. 바람이 "
        "불자 문이 조용히 닫혔다."
    ),
    "vi": (
        "Buổi sáng, bà cụ bán hoa ngồi dưới gốc cây trước cổng trường và gọi tên từng đứa trẻ đi qua. Hôm nay "
        "trời mưa nhẹ, đường phố vắng hơn mọi khi. Một người khách dừng lại hỏi mua bó cúc trắng, rồi kể rằng "
        "anh vừa trở về sau mười năm xa quê. Không ai biết vì sao bà bỗng mỉm cười."
    ),
}
"""Texts by language code."""
NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "pl": "Polish",
    "ru": "Russian",
    "tr": "Turkish",
    "ar": "Arabic",
    "hi": "Hindi",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "vi": "Vietnamese",
}

KEYWORDS = {
    "c": (
        "#include <string.h>\n#include <stdint.h>\n#define MAX(a, b)\ntypedef struct node {\n	const char "
        "*name;\n	uint32_t flags;\n	void *data;\n} node_t;\nextern inline unsigned long long volatile register "
        "sizeof goto switch case default: break; continue; enum union malloc(sizeof(*p)); free(ptr); "
        "memcpy(dst, src, len); NULL nullptr std::vector<std::string> template <typename T> namespace class "
        "public: private: virtual override constexpr auto &&\n#ifdef __linux__\n#endif\n"
    ),
    "java": (
        "public static void main(String[] args) throws IOException {\n    private final List<String> names = "
        "new ArrayList<>();\n    System.out.println(this.name); implements extends interface abstract "
        "protected boolean instanceof synchronized @Override package import java.util.Map;\n}\n"
    ),
    "javascript": (
        "function const let var => async await require('fs'); module.exports = document.getElementById('app'); "
        "JSON.stringify(value); Promise typeof undefined null true false ===  !== ${} import React, { "
        "useState, useEffect } from 'react'; export default interface Props { readonly: string; number?: "
        "boolean } </div> <span className={styles} onClick={() =>\n"
    ),
    "rust": (
        "fn main() -> Result<(), Box<dyn Error>> { let mut self &self Option<T> Some(x) None Ok(()) Err(e) "
        'match impl trait pub struct enum use crate:: mod unwrap() println!("{}", Vec<u8> &str String::from '
        "usize i32 u64 f64 where #[derive(Debug, Clone)] ?;\n"
    ),
    "go": (
        'package main\n\nimport (\n	"fmt"\n)\n\nfunc (s *Server) Handle(ctx context.Context, err error) (int, '
        'error) {\n	if err != nil {\n		return nil, fmt.Errorf("failed: %w", err)\n	}\n	defer mu.Unlock() go '
        "func() chan map[string]interface{} range make([]byte, len) := struct type var\n}\n"
    ),
    "sql": (
        "CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, name VARCHAR(255) NOT NULL); INSERT INTO "
        "VALUES UPDATE SET DELETE FROM WHERE INNER JOIN OUTER GROUP BY ORDER BY DISTINCT BETWEEN LIKE UNION "
        "ALTER INDEX FOREIGN REFERENCES\n"
    ),
    "shell": (
        '#!/bin/sh\nexport PATH="$HOME/bin:$PATH"\nif [ -z "${VAR:-}" ]; then exit 0; elif else fi; while read '
        "-r line; do done; case esac function local echo grep -E sed -i awk '{print $1}' | sort | uniq > "
        "/dev/null 2>&1 && sudo apt-get install -y git commit -m docker run --rm -it\n"
    ),
    "html": (
        '<html><head><meta name="viewport" content="width=device-width"><script src="</script><style> body { '
        "margin: 0; padding: 10px; color: #fff; background: rgba(0, 0, 0, 0.5); display: flex; font-size: "
        '14px; } @media </style><a href="https://www.example.com/"><img alt="<ul><li><table><tr><td> &nbsp; '
        "&amp; </body></html>\n"
    ),
    "json": (
        '{\n  "name": "value",\n  "version": "1.0.0",\n  "dependencies": {},\n  "items": [\n    {"id": 1, '
        '"type": null}\n  ]\n}\n---\nkey: value\nlist:\n  - item\n'
    ),
}
"""Keywords by programming language, which are counted; the samples below are not."""

SOURCES = {
    "python": (
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Interval:\n    low: float\n    "
        "high: float\n\n    def __contains__(self, value: float) -> bool:\n        return self.low <= value < "
        'self.high\n\n\ndef overlaps(first, second):\n    """Whether two intervals share a point."""\n    if '
        "first.low > second.low:\n        first, second = second, first\n    return [x for x in (first, "
        "second) if x is not None] and first.high > second.low\n"
    ),
    "c": (
        "#include <stdio.h>\n#include <stdlib.h>\n\nstatic size_t count(const char *text, char wanted) {\n    "
        "size_t found = 0;\n    for (; *text != '\\0'; text++) {\n        if (*text == wanted) found++;\n    "
        "}\n    return found;\n}\n\nint main(int argc, char **argv) {\n    if (argc < 2) {\n        "
        'fprintf(stderr, "usage: %s TEXT\\n", argv[0]);\n        return EXIT_FAILURE;\n    }\n    '
        "printf(\"%zu\\n\", count(argv[1], 'e'));\n    return 0;\n}\n"
    ),
    "javascript": (
        "export async function fetchAll(urls, { retries = 2 } = {}) {\n  const results = [];\n  for (const url "
        "of urls) {\n    try {\n      const response = await fetch(url, { headers: { Accept: "
        "'application/json' } });\n      if (!response.ok) throw new Error(`status ${response.status}`);\n     "
        " results.push(await response.json());\n    } catch (error) {\n      if (retries === 0) return "
        "undefined;\n      console.warn(error.message);\n    }\n  }\n  return results.filter((one) => one !== "
        "null);\n}\n"
    ),
    "rust": (
        "use std::collections::HashMap;\n\npub fn histogram(words: &[String]) -> HashMap<&str, usize> {\n    "
        "let mut found = HashMap::new();\n    for word in words {\n        "
        "*found.entry(word.as_str()).or_insert(0) += 1;\n    }\n    found\n}\n\nimpl Default for Config {\n    "
        "fn default() -> Self {\n        Self { depth: 4, verbose: false }\n    }\n}\n"
    ),
    "sql": (
        "SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS revenue\nFROM customers AS c\nLEFT JOIN orders AS "
        "o ON o.customer_id = c.id\nWHERE o.created_at >= '2024-01-01' AND c.active = TRUE\nGROUP BY "
        "c.name\nHAVING COUNT(*) > 3\nORDER BY revenue DESC\nLIMIT 20;\n"
    ),
    "shell": (
        '#!/usr/bin/env bash\nset -euo pipefail\nfor file in "$@"; do\n  if [[ -f "$file" ]]; then\n    '
        'sha256sum "$file" >> sums.txt\n  else\n    echo "missing: $file" >&2\n    exit 1\n  fi\ndone\n'
    ),
    "html": (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <meta charset="utf-8">\n  <title>Tide table</title>\n  '
        '<link rel="stylesheet" href="/style.css">\n</head>\n<body>\n  <div class="row" id="main">\n    '
        '<button type="submit" onclick="refresh()">Refresh</button>\n  </div>\n</body>\n</html>\n'
    ),
}
"""Code by its language."""

PUNCTUATION = (
    " “ ” ‘ ’ „ « » ‹ › – — … • · © ® ™ § ¶ † ° ± × ÷ ≤ ≥ ≠ ≈ → ← ↑ ↓ € £ ¥ ½ ¼ ² ³ µ é è ê á à â ä ã å ç "
    "í ï ñ ó ö ô ú ü ß ø æ œ"
)
"""Non-ASCII punctuation and letters in texts of Latin script."""
ENDS, QUOTES = ". , ? ! … — ; : )", "” ’ » \" '"
"""Ends of quoted speech and closing quotes: vocabularies have tokens of both together."""
