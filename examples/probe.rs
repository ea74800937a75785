#![allow(unsafe_code)]
use half::bf16;
use shallower_core::*;


fn rng(s:&mut u64)->f64{ *s^=*s<<13;*s^=*s>>7;*s^=*s<<17; (*s>>11) as f64/(1u64<<53) as f64}
fn normal(s:&mut u64)->f64{ (0..12).map(|_|rng(s)).sum::<f64>()-6.0 }
unsafe extern "C" { fn clock_gettime(c:i32,t:*mut [i64;2])->i32; }
fn cpu()->f64{ let mut t=[0i64;2]; unsafe{clock_gettime(3,&mut t);} t[0] as f64+t[1] as f64/1e9 }
fn main(){
  let pool=rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
  let kind=std::env::args().nth(1).unwrap_or("walk".into());
  let only=std::env::args().nth(2).unwrap_or_default();
  for (samples,n,d) in [(48,33,4096),(8,81,8192),(600,31,576)] { if !format!("{n}x{d}").contains(&only) {continue}
    let mut s=88172645463325252u64;
    let mut data=vec![bf16::ZERO;samples*n*d];
    for i in 0..samples { 
      let mut x:Vec<f64>=(0..d).map(|_|normal(&mut s)*3.0).collect();
      for l in 0..n { for k in 0..d { 
          let v = match kind.as_str() {"random"=>normal(&mut s), _=>{ x[k]+=normal(&mut s); if kind=="massive" && k<2 {x[k]*300.0} else {x[k]}}};
          data[(i*n+l)*d+k]=bf16::from_f64(v);} } }
    let view=States::new(&data,samples,n,d,Order::SampleFirst).unwrap();
    let flops=(n*(n+1)/2*2*d) as f64;
    
    let mut reference:Option<Vec<f64>>=None;
    println!("peak bf16 {:.1} f32 {:.1}",peak(true),peak(false)); for tier in Tier::available() { if let Ok(t)=std::env::var("T") { if t!=tier.name() {continue} }
      let mut best=f64::MAX;
      let mut mean=vec![];
      for _ in 0..std::env::var("R").map(|r|r.parse().unwrap()).unwrap_or(7) { let mut a=Accumulator::new(n,&[Metric::Angular]).unwrap().with_tier(tier).unwrap();
        let t=cpu(); pool.install(||a.update(&view)).unwrap(); best=best.min(cpu()-t);
        mean=a.mean(Metric::Angular).unwrap(); }
      let err=reference.as_ref().map(|r|r.iter().zip(&mean).map(|(a,b)|(a-b).abs()).fold(0.0,f64::max)).unwrap_or(0.0);
      if reference.is_none(){reference=Some(mean.clone());}
      println!("{n}x{d} {tier:>11}: {:.2} us {:.1} GFLOP/s err {:.1e} d(0,1)={:.3} d(n-2,n-1)={:.3} near {}",best/samples as f64*1e6,flops*samples as f64/best/1e9,err,mean[1],mean[(n-2)*n+n-1],std::env::var("X").unwrap_or_default());
    }
  }
}

fn peak(b:bool)->f64{ let t=cpu(); let n=3_000_000u64; unsafe{ if b {pb(n)} else {pf(n)} }; let e=cpu()-t; (n*16*if b{64}else{32}) as f64/e/1e9 }
use std::arch::x86_64::*;
#[target_feature(enable="avx512f,avx512vl,avx512bf16")] unsafe fn pb(n:u64){ let mut a=[_mm512_set1_ps(0.0);16]; let x:__m512bh=unsafe{std::mem::transmute(_mm512_set1_epi16(0x3f80))}; for _ in 0..n { for i in 0..16 { a[i]=_mm512_dpbf16_ps(a[i],x,x); } unsafe{std::arch::asm!("/* {0} */", in(reg) 0)} } std::hint::black_box(a); }
#[target_feature(enable="avx512f,avx512vl")] unsafe fn pf(n:u64){ let mut a=[_mm512_set1_ps(0.0);16]; let x=_mm512_set1_ps(1.0000001); for _ in 0..n { for i in 0..16 { a[i]=_mm512_fmadd_ps(x,x,a[i]); } unsafe{std::arch::asm!("/* {0} */", in(reg) 0)} } std::hint::black_box(a); }
