// SPDX-License-Identifier: GPL-2.0

//! What the tree stands on in the kernel: pages, CPUs, and the prune protocol of `kho_nodemem.rs`.

use super::{
    atomic::AtomicU64,
    kho_key::Key,
    kho_radix::{
        self,
        Hints,
        Node,
        NodeAddr,
        NodeMem,
        Tree,
        LEAF_BITS,
        TABLE_BITS,
        WORDS, //
    },
    Break,
    PAGE_SHIFT,
};
use loom::sync::{
    atomic::AtomicU64 as Number,
    Arc,
    Mutex,
    MutexGuard, //
};
use std::{
    cell::Cell,
    sync::atomic::{
        AtomicBool,
        Ordering::{
            Acquire,
            Relaxed,
            Release,
            SeqCst, //
        },
    },
};

const CPUS: usize = 2;
const PAGES: usize = 8;

/// Where the first page is.
const BASE: u64 = 0x1000;

/// What is in a page that nobody uses. It is no node's address.
const POISON: u64 = 0xdead_dead_dead_dead;

#[repr(C)]
struct Page {
    words: [AtomicU64; WORDS as usize],
}

/// The machine that a scenario runs on.
pub(crate) struct Machine {
    /// Locked while a task runs with preemption disabled, which is a read-side section for RCU.
    cpus: [Mutex<Hints>; CPUS],
    generation: Number,
    prune: Mutex<()>,
    free: Mutex<Vec<usize>>,
    pages: [Page; PAGES],
    /// Which pages are allocated. No task learns anything from it.
    live: [AtomicBool; PAGES],
}

impl Machine {
    pub(crate) fn new() -> Arc<Self> {
        let page = |_| Page {
            words: std::array::from_fn(|_| AtomicU64::new(POISON)),
        };
        Arc::new(Self {
            cpus: std::array::from_fn(|_| Mutex::new(Hints::default())),
            generation: Number::new(0),
            prune: Mutex::new(()),
            // The page that was freed last is used first.
            free: Mutex::new((0..PAGES).rev().collect()),
            pages: std::array::from_fn(page),
            live: std::array::from_fn(|_| AtomicBool::new(false)),
        })
    }

    /// Returns the number of the page at `phys`, which is in use.
    fn page(&self, phys: u64) -> usize {
        let offset = phys.wrapping_sub(BASE);
        assert_eq!(offset % (1 << PAGE_SHIFT), 0, "{phys:#x} is no node");
        let page = (offset >> PAGE_SHIFT) as usize;
        assert!(page < PAGES, "{phys:#x} is no node");
        assert!(self.live[page].load(SeqCst), "{phys:#x} is not allocated");
        page
    }

    /// Returns the keys of the tree at `root`, and how many nodes it has. Looks at what was
    /// written last: this is what another kernel would find.
    fn walk(&self, root: NodeAddr) -> (Vec<u64>, usize) {
        let (mut keys, mut nodes) = (Vec::new(), 0);
        self.descend(root.get(), kho_radix::DEPTH - 1, 0, &mut keys, &mut nodes);
        (keys, nodes)
    }

    fn descend(&self, phys: u64, level: u32, first: u64, keys: &mut Vec<u64>, nodes: &mut usize) {
        *nodes += 1;
        for (i, word) in (0..).zip(&self.pages[self.page(phys)].words) {
            let word = word.last();
            if level == 0 {
                let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
                keys.extend(bits.map(|bit| first + i * 64 + bit));
            } else if word != 0 {
                let shift = LEAF_BITS + (level - 1) * TABLE_BITS;
                self.descend(word, level - 1, first + (i << shift), keys, nodes);
            }
        }
    }

    /// Checks that `trees` have these keys, that no page is lost, and that nobody has written to
    /// one that was free.
    pub(crate) fn check(&self, trees: &[(NodeAddr, &[u64])]) {
        let mut used = 0;
        for (root, expected) in trees {
            let (keys, nodes) = self.walk(*root);
            assert_eq!(keys, *expected);
            used += nodes;
        }
        let live = self.live.iter().filter(|live| live.load(SeqCst)).count();
        assert_eq!(live, used, "pages were lost");
        for (page, live) in self.pages.iter().zip(&self.live) {
            let touched = page.words.iter().any(|word| word.last() != POISON);
            assert!(live.load(SeqCst) || !touched, "a free page was used");
        }
    }

    /// Waits until whoever has preemption disabled now has enabled it: what they did is seen, and
    /// who disables it later sees what was done before.
    fn synchronize_rcu(&self) {
        if !Break::Grace.is_on() {
            self.cpus.iter().for_each(|cpu| drop(cpu.lock().unwrap()));
        }
    }
}

/// A task, which is on some CPU.
pub(crate) struct Task {
    machine: Arc<Machine>,
    cpu: Cell<usize>,
    /// Whether it goes to the next CPU after each pass.
    wanders: bool,
    /// The tree that it takes nodes out of.
    unlinks: Cell<Option<NodeAddr>>,
}

impl Task {
    pub(crate) fn on(machine: &Arc<Machine>, cpu: usize) -> Self {
        Self {
            machine: machine.clone(),
            cpu: Cell::new(cpu),
            wanders: false,
            unlinks: Cell::new(None),
        }
    }

    pub(crate) fn wandering_from(machine: &Arc<Machine>, cpu: usize) -> Self {
        Self {
            wanders: true,
            ..Self::on(machine, cpu)
        }
    }

    pub(crate) fn tree(&self, root: NodeAddr) -> Tree<&Self> {
        Tree::from_root(self, root)
    }

    /// As `kho_nodemem::prune()`.
    pub(crate) fn prune(&self, root: NodeAddr) {
        let machine = &self.machine;
        let _alone = machine.prune.lock().unwrap();
        let tree = self.tree(root);
        if tree.has_empty() {
            machine.generation.fetch_add(1, Relaxed);
            machine.synchronize_rcu();
            self.unlinking(root, || tree.prune());
            let order = if Break::End.is_on() { Relaxed } else { Release };
            machine.generation.fetch_add(1, order);
        }
    }

    pub(crate) fn destroy(&self, root: NodeAddr) {
        self.unlinking(root, || self.tree(root).destroy());
    }

    /// Does `work`, which frees nodes of the tree at `root`: at no time does it have any that is
    /// free.
    fn unlinking(&self, root: NodeAddr, work: impl FnOnce()) {
        self.unlinks.set(Some(root));
        work();
        self.unlinks.set(None);
    }
}

impl<'t> NodeMem for &'t Task {
    type Guard<'a>
        = TreeGuard<'t>
    where
        Self: 'a;

    /// As `kho_nodemem.rs` does it.
    fn enter(&self) -> TreeGuard<'t> {
        let task: &'t Task = self;
        let machine = &task.machine;
        loop {
            let cpu = task.cpu.get();
            let hints = machine.cpus[cpu].lock().unwrap();
            if task.wanders {
                task.cpu.set((cpu + 1) % CPUS);
            }
            let order = if Break::Enter.is_on() { Relaxed } else { Acquire };
            let generation = machine.generation.load(order);
            if generation & 1 == 0 || Break::Wait.is_on() {
                let generation = if Break::Generation.is_on() { 0 } else { generation };
                return TreeGuard { hints, generation };
            }
            drop(hints);
            drop(machine.prune.lock().unwrap());
        }
    }

    fn new_generation(&self) {
        if !Break::Forget.is_on() {
            self.machine.generation.fetch_add(2, Relaxed);
        }
    }

    fn alloc(&self) -> Option<NodeAddr> {
        let page = self.machine.free.lock().unwrap().pop()?;
        assert!(!self.machine.live[page].swap(true, SeqCst));
        let words = &self.machine.pages[page].words;
        words.iter().for_each(|word| word.store(0, Relaxed));
        NodeAddr::new(BASE + ((page as u64) << PAGE_SHIFT))
    }

    fn free(&self, node: NodeAddr) {
        let page = self.machine.page(node.get());
        assert!(self.machine.live[page].swap(false, SeqCst));
        if let Some(root) = self.unlinks.get().filter(|root| *root != node) {
            self.machine.walk(root);
        }
        let words = &self.machine.pages[page].words;
        words.iter().for_each(|word| word.store(POISON, Relaxed));
        self.machine.free.lock().unwrap().push(page);
    }

    fn node(&self, addr: NodeAddr) -> &Node {
        let page = &self.machine.pages[self.machine.page(addr.get())];
        assert_eq!(size_of::<Page>(), size_of::<Node>());
        // SAFETY: A node is an array of as many words, each as an `AtomicU64`.
        unsafe { &*(&raw const *page).cast() }
    }
}

/// Being in a tree.
pub(crate) struct TreeGuard<'t> {
    hints: MutexGuard<'t, Hints>,
    generation: u64,
}

impl kho_radix::Guard for TreeGuard<'_> {
    fn hints(&self) -> &Hints {
        &self.hints
    }

    fn generation(&self) -> u64 {
        self.generation
    }
}

pub(crate) fn key(key: u64) -> Key {
    Key::new(key).unwrap()
}
