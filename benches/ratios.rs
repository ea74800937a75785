//! The ratios that say how near the engine is to the machine, all measured in turn in one
//! run: the whole pipeline of each tier against the pure read of the same bytes from the
//! same buffer, against the peak of its instruction in registers, and two threads against
//! one. `cargo bench --bench ratios [-- SHAPE... TIER...]`; `--test` checks the answers alone.

#![allow(unsafe_code)]

mod workload;

use std::hint::black_box;
use std::time::Instant;

use shallower_core::Tier;
use workload::{Shape, check, flops, mean, peaks, read, states};

const SHAPES: [(usize, usize); 3] = [(33, 4096), (81, 8192), (31, 576)];

/// Far more than the caches of one core.
const BYTES: usize = 96 << 20;

const ROUNDS: usize = 9;

/// The runs that are timed, and the seconds of each round.
struct Contest<'a> {
    names: Vec<String>,
    runs: Vec<Box<dyn Fn() + 'a>>,
    seconds: Vec<Vec<f64>>,
}

impl<'a> Contest<'a> {
    fn new() -> Self {
        Self {
            names: Vec::new(),
            runs: Vec::new(),
            seconds: Vec::new(),
        }
    }

    fn add(&mut self, name: &str, run: impl Fn() + 'a) {
        self.names.push(name.to_owned());
        self.runs.push(Box::new(run));
        self.seconds.push(Vec::new());
    }

    /// All in turn, again and again: what slows the machine for a while slows all of them.
    fn run(&mut self) {
        for _ in 0..ROUNDS {
            for (run, seconds) in self.runs.iter().zip(&mut self.seconds) {
                let begin = Instant::now();
                run();
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
    }

    fn least(&self, name: &str) -> f64 {
        let place = self.names.iter().position(|other| other == name).unwrap();
        self.seconds[place]
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min)
    }

    fn median(&self, name: &str) -> f64 {
        let place = self.names.iter().position(|other| other == name).unwrap();
        let mut seconds = self.seconds[place].clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
}

fn measure((num_states, width): (usize, usize), stream: bool, tiers: &[Tier], test: bool) {
    let of_sample = num_states * width * 2;
    let shape: Shape = (BYTES / of_sample, num_states, width);
    let shape = if test { (4, num_states, width) } else { shape };
    let data = states(shape, stream);
    let few = shape.0.min(4);
    for &tier in tiers {
        check(
            tier,
            &data[..few * num_states * width],
            (few, num_states, width),
        );
    }
    if test {
        return;
    }
    let (one, two) = (pool(1), pool(2));
    let mut peaks = peaks();
    peaks.retain(|(tier, _)| tiers.contains(tier));
    let mut contest = Contest::new();
    contest.add("read", || {
        black_box(read(&data));
    });
    for &tier in tiers {
        contest.add(tier.name(), {
            let (one, data) = (&one, &data);
            move || {
                black_box(one.install(|| mean(tier, data, shape)));
            }
        });
        contest.add(&format!("{tier} twice"), {
            let (two, data) = (&two, &data);
            move || {
                black_box(two.install(|| mean(tier, data, shape)));
            }
        });
    }
    for &(tier, run) in &peaks {
        contest.add(&format!("peak {tier}"), move || {
            // SAFETY: the tiers of `peaks` are available.
            black_box(unsafe { run() });
        });
    }
    contest.run();
    let microseconds = |seconds: f64| seconds / shape.0 as f64 * 1e6;
    let bytes = (data.len() * 2) as f64;
    println!(
        "{num_states}x{width} {} | read {:.2} us a sample, {:.1} GB/s",
        if stream { "stream" } else { "rows" },
        microseconds(contest.least("read")),
        bytes / contest.least("read") / 1e9,
    );
    println!("tier        us least  median  / read  of peak  peak GFLOP/s  2 threads");
    for (tier, run) in peaks {
        let name = tier.name();
        // SAFETY: as above.
        let operations = unsafe { run() } as f64;
        let peak = operations / contest.least(&format!("peak {tier}"));
        println!(
            "{name:10} {:9.2} {:7.2} {:7.2} {:7.1}% {:13.0} {:10.2}",
            microseconds(contest.least(name)),
            microseconds(contest.median(name)),
            contest.least(name) / contest.least("read"),
            100.0 * flops(shape) as f64 / contest.least(name) / peak,
            peak / 1e9,
            contest.least(name) / contest.least(&format!("{tier} twice")),
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let test = arguments.iter().any(|argument| argument == "--test");
    let (tiers, wanted): (Vec<&String>, Vec<&String>) = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .partition(|argument| argument.parse::<Tier>().is_ok());
    let mut measured = Tier::available();
    measured.retain(|&tier| {
        tier != Tier::Scalar && (tiers.is_empty() || tiers.iter().any(|name| *name == tier.name()))
    });
    for shape in SHAPES {
        for stream in [false, true] {
            let name = format!(
                "{}x{} {}",
                shape.0,
                shape.1,
                if stream { "stream" } else { "rows" }
            );
            if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
                measure(shape, stream, &measured, test);
            }
        }
    }
}
