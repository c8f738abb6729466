package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

// job is what the load generator is told to do.
type job struct {
	Port          int    `json:"port"`
	Request       string `json:"request"` // file with a whole HTTP request; holes in it name the conversation
	Conversations int    `json:"conversations"`
	// closed: each connection asks again when it was answered.
	// paced:  each asks once; what is measured is the middle, when all of them flow.
	// slow:   each asks once, and is held open until stdin says to close.
	// stalled: each asks once and does not read on, until stdin says to.
	Mode        string           `json:"mode"`
	Concurrency int              `json:"concurrency"`
	Warmup      float64          `json:"warmup"`
	Seconds     float64          `json:"seconds"`
	AtLeast     int              `json:"at_least"` // requests, should those seconds be too short for them
	Expect      expectation      `json:"expect"`
	Watch       map[string][]int `json:"watch"` // name -> processes whose CPU time is read
}

// expectation is what every answer must be like; the one it was made from was checked word by word.
type expectation struct {
	Frames int    `json:"frames"` // events, in the caller's dialect
	Marker string `json:"marker"` // what each delta has in it
	Count  int    `json:"count"`  // how many of those
	Ending string `json:"ending"` // the last bytes
	Bytes  int    `json:"bytes"`  // of the body; 0 when it differs
}

type usage struct {
	CPU  int64 `json:"cpu_ns"`
	Wait int64 `json:"wait_ns"` // ready to run, but not running
}

type report struct {
	Requests   int                `json:"requests"`
	Errors     int                `json:"errors"`
	Samples    []string           `json:"samples"`
	Connects   int                `json:"connects"`
	Seconds    float64            `json:"seconds"`
	Frames     int                `json:"frames"`
	LatencyUs  map[string]float64 `json:"latency_us"`
	Usage      map[string]usage   `json:"usage"`
	Own        usage              `json:"own"`
	InFlight   int                `json:"in_flight"`
	FirstUs    float64            `json:"first_us"` // from the request to the first byte of the answer, median
	BodyBytes  int64              `json:"body_bytes"`
	EndedEarly int                `json:"ended_early"` // streams that were to flow or to be held longer
}

type client struct {
	fd       int
	request  []byte
	sent     int
	started  int64
	first    int64
	head     []byte
	inBody   bool
	asking   bool
	used     bool
	goesAway bool
	paused   bool
	framing  body
	text     []byte // the whole body, while it is small enough to be kept
	size     int
	frames   int
	lastByte byte
	deltas   int
	carry    []byte
	wantOut  bool
}

type load struct {
	job       job
	request   []byte
	holes     []int
	serial    int
	poller    *poller
	clients   map[int]*client
	buffer    []byte
	report    report
	latencies []int64
	firsts    []int64
	measuring bool
	stopping  bool
	begun     int // streams whose first event has come
	ended     int
	asked     int
}

// Answers up to this size are kept and checked when they are whole; larger ones as they come.
const keptBody = 1 << 20

func runLoad() error {
	input := bufio.NewReader(os.Stdin)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return err
	}
	l := &load{clients: map[int]*client{}, buffer: make([]byte, 256*1024)}
	if err = json.Unmarshal(line, &l.job); err != nil {
		return err
	}
	if l.request, err = os.ReadFile(l.job.Request); err != nil {
		return err
	}
	for at := 0; ; at += len(stampHole) {
		found := bytes.Index(l.request[at:], stampHole)
		if found < 0 {
			break
		}
		at += found
		l.holes = append(l.holes, at)
	}
	if l.poller, err = newPoller(); err != nil {
		return err
	}
	for range l.job.Concurrency {
		if err = l.connect(); err != nil {
			return err
		}
	}
	switch l.job.Mode {
	case "closed":
		err = l.closed()
	case "paced":
		err = l.paced()
	case "slow", "stalled":
		err = l.held()
	default:
		err = fmt.Errorf("no such mode: %q", l.job.Mode)
	}
	if err != nil {
		return err
	}
	l.report.LatencyUs = percentiles(l.latencies)
	l.report.FirstUs = percentiles(l.firsts)["p50"]
	return json.NewEncoder(os.Stdout).Encode(l.report)
}

func percentiles(values []int64) map[string]float64 {
	slices.Sort(values)
	found := map[string]float64{}
	if len(values) == 0 {
		return found
	}
	for name, share := range map[string]float64{"p50": 0.50, "p90": 0.90, "p99": 0.99, "p999": 0.999, "max": 1} {
		found[name] = float64(values[min(len(values)-1, int(share*float64(len(values))))]) / 1000
	}
	return found
}

// --- what is measured when

func (l *load) closed() error {
	if err := l.run(now()+nanoseconds(l.job.Warmup), nil); err != nil {
		return err
	}
	if err := l.window(nanoseconds(l.job.Seconds)); err != nil {
		return err
	}
	return l.drain(func() bool { return l.report.InFlight == 0 })
}

func (l *load) paced() error {
	if err := l.run(now()+10e9, func() bool { return l.begun == l.job.Concurrency }); err != nil {
		return err
	}
	if l.begun < l.job.Concurrency {
		l.fail(nil, fmt.Sprintf("only %d of %d streams began", l.begun, l.job.Concurrency))
	}
	if err := l.run(now()+nanoseconds(l.job.Warmup), nil); err != nil {
		return err
	}
	if err := l.window(nanoseconds(l.job.Seconds)); err != nil {
		return err
	}
	l.report.EndedEarly = l.ended
	return l.drain(func() bool { return l.ended >= l.job.Concurrency })
}

// held opens all, says so, and waits to be told how to end.
func (l *load) held() error {
	enough := func() bool { return l.begun+l.report.Errors >= l.job.Concurrency }
	if err := l.run(now()+60e9, enough); err != nil {
		return err
	}
	fmt.Printf("{\"held\":%d}\n", l.begun)
	if err := l.poller.add(0, readable); err != nil {
		return err
	}
	told := false
	for !told {
		events, err := l.poller.wait(-1)
		if err != nil {
			return err
		}
		for _, event := range events {
			if event.Fd == 0 {
				told = true
				continue
			}
			l.handle(event)
		}
	}
	command := make([]byte, 64)
	n, _ := syscall.Read(0, command)
	l.report.EndedEarly = l.ended
	l.stopping = true
	if string(bytes.TrimSpace(command[:max(0, n)])) != "drain" {
		l.report.Requests = l.begun
		for _, one := range l.clients {
			_ = syscall.Close(one.fd)
		}
		return nil
	}
	_ = l.poller.change(0, 0)
	l.measuring = true
	for _, one := range l.clients {
		one.paused = false
		_ = l.poller.change(one.fd, readable)
	}
	return l.drain(func() bool { return l.ended >= l.job.Concurrency })
}

func nanoseconds(seconds float64) int64 { return int64(seconds * 1e9) }

// How much longer than it should a window may be.
const longest = int64(20e9)

// window measures for a while.
func (l *load) window(length int64) error {
	before, own := l.usage()
	l.measuring = true
	started := now()
	err := l.run(started+length, nil)
	if err == nil && l.report.Requests < l.job.AtLeast {
		err = l.run(started+length+longest, func() bool { return l.report.Requests >= l.job.AtLeast })
	}
	l.report.Seconds = float64(now()-started) / 1e9
	l.measuring = false
	after, ownAfter := l.usage()
	l.report.Usage = map[string]usage{}
	for name := range after {
		l.report.Usage[name] = usage{after[name].CPU - before[name].CPU, after[name].Wait - before[name].Wait}
	}
	l.report.Own = usage{ownAfter.CPU - own.CPU, ownAfter.Wait - own.Wait}
	return err
}

// drain lets what was asked be answered; what is left then is an error.
func (l *load) drain(isOver func() bool) error {
	l.stopping = true
	if err := l.run(now()+30e9, isOver); err != nil {
		return err
	}
	if !isOver() {
		l.fail(nil, "answers did not end")
	}
	return nil
}

// run works until a time, or until a condition holds.
func (l *load) run(until int64, isOver func() bool) error {
	for isOver == nil || !isOver() {
		left := until - now()
		if left <= 0 {
			return nil
		}
		events, err := l.poller.wait(time.Duration(left))
		if err != nil {
			return err
		}
		for _, event := range events {
			l.handle(event)
		}
		// What fails at once, again and again, will go on to.
		if l.report.Errors > 100+l.job.Concurrency {
			return nil
		}
	}
	return nil
}

func (l *load) usage() (map[string]usage, usage) {
	all := map[string]usage{}
	for name, pids := range l.job.Watch {
		sum := usage{}
		for _, pid := range pids {
			one := usageOf(pid)
			sum.CPU += one.CPU
			sum.Wait += one.Wait
		}
		all[name] = sum
	}
	return all, usageOf(os.Getpid())
}

// usageOf reads a process's CPU time from its clock, to the nanosecond and with threads that have ended.
func usageOf(pid int) usage {
	var spec syscall.Timespec
	const schedClock = 2
	clock := int32(^pid<<3 | schedClock)
	_, _, _ = syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, uintptr(clock), uintptr(unsafe.Pointer(&spec)), 0)
	found := usage{CPU: spec.Nano()}
	tasks, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/schedstat")
	for _, task := range tasks {
		raw, _ := os.ReadFile(task)
		if fields := bytes.Fields(raw); len(fields) > 1 {
			wait, _ := strconv.ParseInt(string(fields[1]), 10, 64)
			found.Wait += wait
		}
	}
	return found
}

// --- connections

func (l *load) connect() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	noDelay(fd)
	if l.job.Mode == "stalled" {
		// Small, so that what is held is held by the proxy.
		_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16*1024)
	}
	address := &syscall.SockaddrInet4{Port: l.job.Port, Addr: [4]byte{127, 0, 0, 1}}
	if err = syscall.Connect(fd, address); err != nil && !errors.Is(err, syscall.EINPROGRESS) {
		return err
	}
	one := &client{fd: fd, request: append([]byte(nil), l.request...), wantOut: true}
	l.clients[fd] = one
	l.report.Connects++
	return l.poller.add(fd, readable|writable)
}

func (l *load) handle(event syscall.EpollEvent) {
	one := l.clients[int(event.Fd)]
	if one == nil {
		return
	}
	if event.Events&writable != 0 {
		if !one.asking {
			if !l.ask(one) {
				return
			}
		} else {
			l.send(one)
		}
	}
	if event.Events&^writable != 0 && l.clients[one.fd] == one {
		l.read(one)
	}
}

// ask begins a request, unless nothing more is to be asked.
func (l *load) ask(one *client) bool {
	if l.stopping || (l.job.Mode != "closed" && one.used) {
		l.quiet(one)
		return false
	}
	if l.job.Conversations > 0 {
		stamp := fmt.Appendf(nil, "%012x", l.serial%l.job.Conversations)
		for _, at := range l.holes {
			copy(one.request[at:], stamp)
		}
		l.serial++
	}
	one.sent, one.started, one.first, one.asking = 0, now(), 0, true
	one.inBody, one.goesAway = false, false
	one.head, one.text, one.carry = one.head[:0], one.text[:0], one.carry[:0]
	one.size, one.frames, one.deltas, one.lastByte = 0, 0, 0, 0
	l.report.InFlight++
	return l.send(one)
}

// quiet leaves a connection open with nothing to be written to it.
func (l *load) quiet(one *client) {
	if one.wantOut {
		one.wantOut = false
		_ = l.poller.change(one.fd, readable)
	}
}

func (l *load) send(one *client) bool {
	if one.sent < len(one.request) {
		n, errno := rawWrite(one.fd, one.request[one.sent:])
		switch {
		case errno == syscall.EAGAIN:
		case errno != 0:
			l.lost(one, errno.Error())
			return false
		default:
			one.sent += n
		}
	}
	if one.sent == len(one.request) {
		l.quiet(one)
	} else if !one.wantOut {
		one.wantOut = true
		_ = l.poller.change(one.fd, readable|writable)
	}
	return true
}

func (l *load) drop(one *client) {
	delete(l.clients, one.fd)
	_ = syscall.Close(one.fd)
}

// lost gives up a connection, and with it what was asked on it. One that was closed before the first byte
// of an answer, after it had served, was closed between two requests: that is no failure.
func (l *load) lost(one *client, why string) {
	l.drop(one)
	if one.asking {
		l.report.InFlight--
		if !one.used || one.first != 0 {
			l.ended++
			l.fail(one, why)
		}
	}
	if l.job.Mode == "closed" && !l.stopping {
		if err := l.connect(); err != nil {
			l.fail(nil, err.Error())
		}
	}
}

func (l *load) fail(one *client, why string) {
	l.report.Errors++
	if one != nil && !one.inBody && len(one.head) > 0 {
		status, _, _ := bytes.Cut(one.head, []byte("\r\n"))
		why = string(status) + ": " + why
	}
	if len(l.report.Samples) < 5 {
		l.report.Samples = append(l.report.Samples, why)
	}
}

func (l *load) read(one *client) {
	buffer := l.buffer
	if l.job.Mode == "stalled" && !l.stopping {
		buffer = buffer[:4096]
	}
	n, errno := rawRead(one.fd, buffer)
	if errno == syscall.EAGAIN {
		return
	}
	if errno != 0 {
		l.lost(one, "lost: "+errno.Error())
		return
	}
	if n == 0 {
		l.lost(one, "closed before the end of the answer")
		return
	}
	if !one.asking {
		l.fail(nil, "bytes after the end of an answer")
		l.lost(one, "")
		return
	}
	if one.first == 0 {
		one.first = now()
	}
	data := buffer[:n]
	if !one.inBody {
		if data = l.readHead(one, data); data == nil {
			return
		}
	}
	before := one.frames
	rest, err := one.framing.take(data, func(piece []byte) { l.look(one, piece) })
	if err != nil || len(rest) > 0 {
		l.lost(one, "bad framing")
		return
	}
	if before == 0 && one.frames > 0 {
		l.begun++
		if l.job.Mode == "stalled" && !l.stopping {
			one.paused = true
			_ = l.poller.change(one.fd, 0)
		}
	}
	if one.framing.state == done {
		l.finish(one)
	}
}

// readHead takes the head of an answer off data; nil when it is not whole, or not good.
func (l *load) readHead(one *client, data []byte) []byte {
	before := len(one.head)
	one.head = append(one.head, data...)
	end := bytes.Index(one.head, []byte("\r\n\r\n"))
	if end < 0 {
		if len(one.head) > maxHead {
			l.lost(one, "endless head")
		}
		return nil
	}
	head := one.head[:end+2]
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200")) {
		l.lost(one, string(data[end+4-before:]))
		return nil
	}
	one.goesAway = sameLettersOrNil(header(head, "connection:"), "close")
	length, known := number(header(head, "content-length:"))
	one.framing = body{left: length}
	if header(head, "transfer-encoding:") != nil {
		one.framing = body{chunked: true}
	} else if !known {
		l.lost(one, "an answer of unknown length")
		return nil
	}
	one.inBody = true
	return data[end+4-before:]
}

// look counts what came of an answer, and keeps it when it can be kept.
func (l *load) look(one *client, piece []byte) {
	frames := bytes.Count(piece, []byte("\n\n"))
	if one.lastByte == '\n' && piece[0] == '\n' {
		frames++
	}
	one.frames += frames
	if l.measuring {
		l.report.Frames += frames
		l.report.BodyBytes += int64(len(piece))
	}
	one.lastByte = piece[len(piece)-1]
	one.size += len(piece)
	if l.job.Expect.Bytes <= keptBody {
		one.text = append(one.text, piece...)
		return
	}
	// A marker may lie across two pieces.
	marker := []byte(l.job.Expect.Marker)
	seam := append(one.carry, piece[:min(len(piece), len(marker)-1)]...)
	one.deltas += bytes.Count(piece, marker) + bytes.Count(seam, marker)
	tail := append(append([]byte(nil), one.carry...), piece...)
	one.carry = append(one.carry[:0], tail[max(0, len(tail)-len(marker)+1):]...)
	keep := len(l.job.Expect.Ending)
	one.text = append(one.text, piece...)
	one.text = append(one.text[:0], one.text[max(0, len(one.text)-keep):]...)
}

func (l *load) finish(one *client) {
	expect := l.job.Expect
	if expect.Bytes <= keptBody {
		one.deltas = bytes.Count(one.text, []byte(expect.Marker))
	}
	one.asking, one.used = false, true
	l.report.InFlight--
	l.ended++
	switch {
	case one.frames != expect.Frames:
		l.fail(one, fmt.Sprintf("%d events instead of %d", one.frames, expect.Frames))
	case one.deltas != expect.Count:
		l.fail(one, fmt.Sprintf("%d deltas instead of %d", one.deltas, expect.Count))
	case !bytes.HasSuffix(one.text, []byte(expect.Ending)):
		l.fail(one, "an answer without its end")
	case expect.Bytes > 0 && one.size != expect.Bytes:
		l.fail(one, fmt.Sprintf("%d bytes instead of %d", one.size, expect.Bytes))
	}
	if l.measuring {
		l.report.Requests++
		l.latencies = append(l.latencies, now()-one.started)
		l.firsts = append(l.firsts, one.first-one.started)
	}
	if one.goesAway {
		l.lost(one, "")
		return
	}
	l.ask(one)
}
