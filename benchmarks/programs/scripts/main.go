// Goroutines, channels, maps, collection of garbage, timers, a socket.
package main

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"
)

type node struct {
	left, right *node
	key         int
}

func build(depth int) *node {
	if depth == 0 {
		return &node{key: 1}
	}
	return &node{build(depth - 1), build(depth - 1), depth}
}

func (n *node) sum() int {
	if n == nil {
		return 0
	}
	return n.left.sum() + n.key + n.right.sum()
}

func main() {
	runtime.GOMAXPROCS(4)
	work, done := make(chan int), make(chan int, 16)
	var group sync.WaitGroup
	for i := 0; i < 8; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for n := range work {
				done <- build(10 + n%4).sum()
			}
		}()
	}
	go func() {
		for i := 0; i < 200; i++ {
			work <- i
		}
		close(work)
		group.Wait()
		close(done)
	}()
	total := 0
	for n := range done {
		total += n
	}
	fmt.Println("trees", total)
	words := map[string]int{}
	for i := 0; i < 100000; i++ {
		words[fmt.Sprintf("%x", i*7919%5003)]++
	}
	keys := make([]string, 0, len(words))
	for k := range words {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	fmt.Printf("%d %x\n", len(keys), sha256.Sum256([]byte(strings.Join(keys, ","))))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go func() {
		for {
			peer, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer peer.Close()
				for lines := bufio.NewScanner(peer); lines.Scan(); {
					fmt.Fprintln(peer, strings.ToUpper(lines.Text()))
				}
			}()
		}
	}()
	var mutex sync.Mutex
	answered := 0
	for c := 0; c < 5; c++ {
		group.Add(1)
		go func(c int) {
			defer group.Done()
			peer, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				return
			}
			defer peer.Close()
			answers := bufio.NewScanner(peer)
			for i := 0; i < 200; i++ {
				fmt.Fprintf(peer, "line %d of %d\n", i, c)
				if answers.Scan() && answers.Text() == fmt.Sprintf("LINE %d OF %d", i, c) {
					mutex.Lock()
					answered++
					mutex.Unlock()
				}
			}
		}(c)
	}
	group.Wait()
	fmt.Println("answered", answered)
	ticks := 0
	for range time.Tick(5 * time.Millisecond) {
		if ticks++; ticks == 10 {
			break
		}
	}
	select {
	case <-make(chan int):
	case <-time.After(20 * time.Millisecond):
		fmt.Println("ticks", ticks)
	}
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	fmt.Println("collected", stats.NumGC > 3)
	defer os.Exit(4)
	defer func() { fmt.Println("recovered", recover()) }()
	var nothing *node
	fmt.Println(nothing.key)
}
