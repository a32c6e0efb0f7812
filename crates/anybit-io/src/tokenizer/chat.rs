//! Chat templates: the Jinja source that models carry to turn a conversation into a prompt.
//!
//! The environment is that of transformers' `apply_chat_template` (`utils/chat_template_utils.py`):
//! `trim_blocks` and `lstrip_blocks`, loop controls, the methods of Python's strings and
//! dictionaries, `raise_exception`, `strftime_now` and a `tojson` that writes what Python's
//! `json.dumps` writes. `tools` and `documents` are none, as when nobody passes any.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::{IoError, Result};

/// Its name in messages.
const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant"; templates may know others.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Instructions that a rendering may take: far more than any conversation needs, and few enough
/// that a hostile template ends within a second.
const FUEL: u64 = 10_000_000;

/// A run of nine digits or more. Fuel counts instructions, but `'a' * 10000000000` is a single one
/// that asks for all the memory there is.
fn long_number(source: &str) -> Option<&str> {
    source.split(|c: char| !c.is_ascii_digit()).find(|digits| digits.len() >= 9)
}

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// Parses a template; `bos` and `eos` are the texts of the model's tokens.
    ///
    /// # Errors
    /// [`IoError::Template`] with the line that does not parse.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_syntax(syntax.build().map_err(|e| failed(&e))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        if let Some(number) = long_number(source) {
            let what = format!("the template holds the number {number}; no conversation needs it");
            return Err(IoError::Template { what });
        }
        let source = without_generation_tags(source).into_owned();
        environment.add_template_owned(NAME, source).map_err(|e| failed(&e))?;
        Ok(Self { environment, bos: bos.map(str::to_owned), eos: eos.map(str::to_owned) })
    }

    /// The prompt of a conversation; `add_generation_prompt` ends it where the assistant's answer
    /// begins.
    ///
    /// # Errors
    /// [`IoError::Template`] with the reason and the line: messages that the template refuses, or
    /// a part of Jinja that is not supported.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.as_str(), content => m.content.as_str() })
            .collect();
        // A token that the model lacks is undefined, so that it prints as nothing.
        let token = |token: &Option<String>| match token {
            Some(token) => Value::from(token.as_str()),
            None => Value::UNDEFINED,
        };
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => token(&self.bos),
            eos_token => token(&self.eos),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        template.render(values).map_err(|e| failed(&e))
    }
}

fn failed(error: &Error) -> IoError {
    IoError::Template { what: error.to_string() }
}

/// Training code marks the assistant's turns with `{% generation %}` … `{% endgeneration %}`, a
/// tag of transformers' own that prints nothing; a condition that always holds prints the same.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag, after)) = next_tag(rest) {
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replace(inner, "if true")),
            "endgeneration" => out.push_str(&tag.replace(inner, "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Text up to and with the next "{%", what stands within the tag, and the rest from its "%}" on.
fn next_tag(source: &str) -> Option<(&str, &str, &str)> {
    let start = source.find("{%")? + 2;
    let end = start + source[start..].find("%}")?;
    Some((&source[..start], &source[start..end], &source[end..]))
}

fn raise_exception(message: String) -> std::result::Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: minijinja's own filter, but for the
/// characters that it escapes for HTML.
fn to_json(
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> std::result::Result<String, Error> {
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let what = "tojson(ensure_ascii=true) is not supported";
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let text = minijinja::filters::tojson(value, indent, options)?;
    Ok(unescape_html(text.as_str().unwrap_or_default()))
}

/// Takes back `\u003c`, `\u003e`, `\u0026` and `\u0027` of a JSON text.
fn unescape_html(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    // Backslashes come in pairs with what they escape, so one is never taken for part of another.
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = &rest[at..];
        let known = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')];
        rest = match known.into_iter().find(|(code, _)| escape.starts_with(code)) {
            Some((code, plain)) => {
                out.push(plain);
                &escape[code.len()..]
            }
            None => {
                let len = 1 + escape[1..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&escape[..len]);
                &escape[len..]
            }
        };
    }
    out.push_str(rest);
    out
}

fn strftime_now(format: String) -> std::result::Result<String, Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(&format, seconds)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Python's `strftime` of a time in UTC, the codes that templates use.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, Error> {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, weekday) = (MONTHS[month as usize - 1], WEEKDAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let part = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_string(),
            Some('b') => month_name[..3].to_string(),
            Some('A') => weekday.to_string(),
            Some('a') => weekday[..3].to_string(),
            Some('H') => format!("{:02}", time / 3600),
            Some('M') => format!("{:02}", time / 60 % 60),
            Some('S') => format!("{:02}", time % 60),
            Some('%') => "%".to_string(),
            other => {
                let code = other.map_or(String::new(), String::from);
                let what = format!("strftime_now: %{code} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        };
        out.push_str(&part);
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1 January 1970, by Howard Hinnant's
/// `civil_from_days`: years start in March, so that leap days come last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year_of_era + next_year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

    /// The start of Llama 3.1's, which asks for the date and for tools.
    const LLAMA31: &str = r#"{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;

    /// Qwen2.5's without the branch for tools.
    const QWEN25: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;

    /// The parts of Qwen3's that ask most of the engine.
    const QWEN3: &str = r#"{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

    const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

    const TURNS: [(&str, &str); 3] = [("user", " Hi "), ("assistant", "Yes?"), ("user", "Bye")];

    fn render(source: &str, turns: &[(&str, &str)], prompt: bool) -> Result<String> {
        let turns: Vec<Message> = turns.iter().map(|(r, c)| Message::new(*r, *c)).collect();
        ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(&turns, prompt)
    }

    #[test]
    fn chatml_and_smollm2() {
        let chat = "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n\
                    <|im_start|>user\nBye<|im_end|>\n";
        assert_eq!(render(CHATML, &TURNS, false).unwrap(), chat);
        let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by \
                      Hugging Face<|im_end|>\n";
        let expected = format!("{system}{chat}<|im_start|>assistant\n");
        assert_eq!(render(SMOLLM2, &TURNS, true).unwrap(), expected);
        let own = render(SMOLLM2, &[("system", "Be brief.")], false).unwrap();
        assert_eq!(own, "<|im_start|>system\nBe brief.<|im_end|>\n");
    }

    #[test]
    fn llama3() {
        let user = "<|start_header_id|>user<|end_header_id|>\n\n";
        let assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n";
        let expected =
            format!("<s>{user}Hi<|eot_id|>{assistant}Yes?<|eot_id|>{user}Bye<|eot_id|>{assistant}");
        assert_eq!(render(LLAMA3, &TURNS, true).unwrap(), expected);
        let expected = format!(
            "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December \
             2023\nBe brief.<|eot_id|>{user}Hi<|eot_id|>{assistant}"
        );
        let turns = [("system", "Be brief. "), ("user", "Hi")];
        assert_eq!(render(LLAMA31, &turns, true).unwrap(), expected);
    }

    #[test]
    fn qwen() {
        let expected = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a \
                        helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
                        <|im_start|>assistant\n";
        assert_eq!(render(QWEN25, &[("user", "Hi")], true).unwrap(), expected);
        let turns = [
            ("user", "Hi"),
            ("assistant", "<think>\nwell\n</think>\n\nYes?"),
            ("user", "Bye"),
            ("assistant", "<think>\nso\n</think>\n\nBye"),
        ];
        let expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n\
                        <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\nso\n\
                        </think>\n\nBye<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render(QWEN3, &turns, true).unwrap(), expected);
    }

    #[test]
    fn mistral_refuses_turns_out_of_order() {
        let expected = "<s>[INST]  Hi  [/INST]Yes?</s> [INST] Bye [/INST]";
        assert_eq!(render(MISTRAL, &TURNS, false).unwrap(), expected);
        let error = render(MISTRAL, &TURNS[1..], false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate") && error.contains("chat_template:1"));
    }

    #[test]
    fn a_token_that_the_model_lacks_prints_nothing() {
        let source = "{{ bos_token }}|{{ eos_token is defined }}|{{ tools is none }}";
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(template.render(&[], false).unwrap().to_lowercase(), "|false|true");
    }

    #[test]
    fn generation_tags_and_loop_controls() {
        let source = "{% for m in messages %}\n  {%- generation -%} {{ m.content }} \
                      {%- endgeneration %}{% if loop.index == 2 %}{% break %}{% endif %}\n\
                      {% endfor %}\nend\n";
        assert_eq!(render(source, &TURNS, false).unwrap(), " Hi Yes?end");
        let untouched = "{% if add_generation_prompt %}generation{% endif %}";
        assert_eq!(render(untouched, &TURNS, true).unwrap(), "generation");
    }

    #[test]
    fn json_is_that_of_python() {
        let source = r#"{{ {"a": "<b> & 'c' é \\u003c", "n": [1, none, true]} | tojson }}"#;
        let expected = r#"{"a": "<b> & 'c' é \\u003c", "n": [1, null, true]}"#;
        assert_eq!(render(source, &[], false).unwrap(), expected);
        let source = r#"{{ {"a": [1]} | tojson(indent=2, ensure_ascii=false) }}"#;
        assert_eq!(render(source, &[], false).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}");
        assert!(render("{{ 1 | tojson(ensure_ascii=true) }}", &[], false).is_err());
    }

    #[test]
    fn dates() {
        let format = "%d %b %Y, %A %H:%M:%S %%";
        assert_eq!(strftime(format, 0).unwrap(), "01 Jan 1970, Thursday 00:00:00 %");
        // 29 February 2024 and the day after it.
        let leap = strftime("%Y-%m-%d %a %B %y", 1_709_164_800 + 3_661).unwrap();
        assert_eq!(leap, "2024-02-29 Thu February 24");
        assert_eq!(strftime("%Y-%m-%d", 1_709_251_200).unwrap(), "2024-03-01");
        assert_eq!(strftime("%Y-%m-%d", 4_102_444_799).unwrap(), "2099-12-31");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
        assert!(render("{{ strftime_now('%Y') }}", &[], false).unwrap().as_str() >= "2024");
    }

    #[test]
    fn errors_name_the_line() {
        let error = ChatTemplate::new("a\n{% if %}", None, None).unwrap_err().to_string();
        assert!(error.contains("chat_template:2"), "{error}");
        let error = render("\n\n{{ nothing.at.all }}", &[], false).unwrap_err().to_string();
        assert!(error.contains("chat_template:3"), "{error}");
    }
}
