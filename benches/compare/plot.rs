//! Plots: a horizontal bar for each contender, and a line from the least to the most of the rounds.

use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::comparison::{Comparison, Entry, Figure, Section};
use crate::table::grouped;

type Drawn<T = ()> = Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws what each program costs with its default settings; `None` if the run has none of it.
pub(crate) fn cost(comparison: &Comparison) -> Drawn<Option<String>> {
    let panels = PANELS.iter().filter_map(|(row, title)| {
        let section = comparison.section(row, "tcp-tcp")?;
        Some((title, bars(section, |entry| entry.option().is_none())))
    });
    let panels: Vec<_> = panels.filter(|(_, bars)| !bars.is_empty()).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let height = |bars: &[Bar<'_>]| TITLE + BAR * bars.len() as u32;
    let total = panels.iter().map(|(_, bars)| height(bars)).sum::<u32>() + CAPTION;
    let mut svg = String::new();
    {
        // The SVG is whole once the area is dropped.
        let mut rest = canvas(&mut svg, total)?;
        for (title, bars) in &panels {
            let (panel, below) = rest.split_vertically(height(bars));
            panel_of_bars(&panel, title, bars)?;
            rest = below;
        }
        let style = ("sans-serif", 15).with_color(TEXT).into_text_style(&rest);
        let about = format!(
            "TCP to TCP, less is better. Rounds: {}; bars are medians, lines go from the least to the most.",
            comparison.rounds
        );
        rest.draw_text(&about, &style, (MARGIN, 14))?;
        rest.draw_text(&comparison.machine.to_string(), &style, (MARGIN, 36))?;
    }
    Ok(Some(svg))
}

/// Draws all contenders of a section: their cost, or the memory that an idle connection takes.
pub(crate) fn section(section: &Section) -> Drawn<String> {
    let bars = bars(section, |_| true);
    let mut svg = String::new();
    if !bars.is_empty() {
        panel_of_bars(&canvas(&mut svg, BAR * bars.len() as u32)?, "", &bars)?;
    }
    Ok(svg)
}

struct Bar<'a> {
    name: &'a str,
    figure: Figure,
    label: String,
    color: RGBColor,
}

fn bars<'a>(section: &'a Section, is_shown: impl Fn(&Entry) -> bool) -> Vec<Bar<'a>> {
    let shown = section.entries.iter().filter(|entry| is_shown(entry));
    let bar = |entry: &'a Entry| {
        let (figure, label) = if let Some(held) = entry.held(|held| held.resident) {
            (held, format!("{} bytes", grouped(held.median)))
        } else {
            let cost = entry.cost()?;
            let number = section.unit.number(cost.median);
            (cost, format!("{number} {}", section.unit.symbol()))
        };
        let color = if entry.is_ours() { OURS } else { OTHERS };
        Some(Bar { name: &entry.name, figure, label, color })
    };
    shown.filter_map(bar).collect()
}

/// A white card, which reads on a dark page as well.
fn canvas(svg: &mut String, height: u32) -> Drawn<Area<'_>> {
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

fn panel_of_bars(area: &Area<'_>, title: &str, bars: &[Bar<'_>]) -> Drawn {
    let text = |size| ("sans-serif", size).with_color(TEXT);
    // The axis goes upwards, so that the last contender is number 0.
    let bars: Vec<_> = bars.iter().rev().collect();
    let bar = |position: &SegmentValue<usize>| match position {
        SegmentValue::Exact(number) | SegmentValue::CenterOf(number) => bars.get(*number),
        SegmentValue::Last => None,
    };
    let longest = bars.iter().map(|bar| bar.figure.most).fold(f64::MIN_POSITIVE, f64::max);
    // A fifth of the width is left for the longest bar's label.
    let axes = (0.0..longest * 1.25, (0..bars.len() - 1).into_segmented());
    let mut chart = ChartBuilder::on(area)
        .y_label_area_size(NAMES)
        .margin_top(if title.is_empty() { 0 } else { TITLE })
        .build_cartesian_2d(axes.0, axes.1)?;
    if !title.is_empty() {
        area.draw_text(title, &text(18).into_text_style(area), (NAMES as i32, 16))?;
    }
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(0)
        .y_labels(bars.len())
        .y_label_formatter(&|position| {
            bar(position).map_or_else(String::new, |bar| bar.name.into())
        })
        .y_label_style(text(16))
        .axis_style(TRANSPARENT)
        .draw()?;
    let numbered = || bars.iter().enumerate();
    chart.draw_series(
        Histogram::horizontal(&chart)
            .style_func(|position, _| bar(position).map_or(OTHERS, |bar| bar.color).filled())
            .margin(3)
            .data(numbered().map(|(number, bar)| (number, bar.figure.median))),
    )?;
    chart.draw_series(numbered().map(|(number, bar)| {
        let ends = [bar.figure.least, bar.figure.most];
        PathElement::new(ends.map(|end| (end, SegmentValue::CenterOf(number))), TEXT)
    }))?;
    let label = text(16).into_text_style(area).pos(Pos::new(HPos::Left, VPos::Center));
    chart.draw_series(numbered().map(|(number, bar)| {
        EmptyElement::at((bar.figure.most, SegmentValue::CenterOf(number)))
            + Text::new(bar.label.clone(), (10, 0), label.clone())
    }))?;
    Ok(())
}

/// The panels of the cost plot, all from TCP to TCP.
const PANELS: [(&str, &str); 3] = [
    ("64B-100", "CPU per round trip of 64 bytes, on 100 connections"),
    ("short", "CPU per short connection: connect, 64 bytes there and back, close"),
    ("bulk-down", "CPU per gigabyte, from the backend to the client"),
];

const WIDTH: u32 = 800;
const BAR: u32 = 24;
const TITLE: u32 = 40;
const CAPTION: u32 = 64;
const NAMES: u32 = 210;
const MARGIN: i32 = 14;
const TEXT: RGBColor = RGBColor(36, 41, 47);
const OURS: RGBColor = RGBColor(42, 122, 176);
const OTHERS: RGBColor = RGBColor(186, 196, 204);
