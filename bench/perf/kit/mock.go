package main

import (
	"bytes"
	"container/heap"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

// The prompt names what is played: `bench:NAME.` anywhere in the request's body.
var marker = []byte("bench:")

const longestName = 16

// What stands in a script for a number that is another in each answer.
var stampHole = []byte("@@@@@@@@@@@@")

// scriptPlan is one thing to play, as the plan describes it.
type scriptPlan struct {
	File string `json:"file"` // server-sent events, each ended by an empty line
	Lead int    `json:"lead"` // how many of them are written at once, with the head
	Tail int    `json:"tail"` // how many are written at once at the end
	Pace int64  `json:"pace"` // microseconds between those in the middle, one write each
}

type plan struct {
	Head    string                `json:"head"` // status line and headers of an answer, without the framing
	Merged  bool                  `json:"merged"`
	Pages   map[string]string     `json:"pages"` // path without query -> JSON
	Scripts map[string]scriptPlan `json:"scripts"`
}

// script is a plan with its bytes made ready.
type script struct {
	lead  []byte
	holes []int
	steps [][]byte // what is written at each further step; the last one ends the answer
	pace  int64
}

type answer struct {
	script *script
	next   int
	due    int64
	index  int // in the heap of those that wait; -1 when in none
	conn   *mockConn
}

type mockConn struct {
	fd      int
	head    []byte
	inBody  bool
	body    body
	carry   []byte
	script  *script
	answer  *answer
	out     []byte
	outOpen bool // whether EPOLLOUT is asked for
	path    string
	post    bool
	last    bool
}

type mock struct {
	poller  *poller
	plan    plan
	scripts map[string]*script
	conns   map[int]*mockConn
	waiting answers
	buffer  []byte
	serial  int64
	stats   struct {
		Connections int   `json:"connections"`
		Open        int   `json:"open"`
		Requests    int   `json:"requests"`
		Completed   int   `json:"completed"`
		Aborted     int   `json:"aborted"`
		Playing     int   `json:"playing"`
		Refused     int   `json:"refused"`
		SentBytes   int64 `json:"sent_bytes"`
	}
}

func runMock(arguments []string) error {
	flags := flag.NewFlagSet("mock", flag.ContinueOnError)
	planFile := flags.String("plan", "", "what to play")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	m := &mock{scripts: map[string]*script{}, conns: map[int]*mockConn{}, buffer: make([]byte, 256*1024)}
	raw, err := os.ReadFile(*planFile)
	if err != nil {
		return err
	}
	if err = json.Unmarshal(raw, &m.plan); err != nil {
		return err
	}
	for name, one := range m.plan.Scripts {
		if m.scripts[name], err = m.load(one); err != nil {
			return err
		}
	}
	if m.poller, err = newPoller(); err != nil {
		return err
	}
	listener, port, err := listen()
	if err != nil {
		return err
	}
	if err = m.poller.add(listener, readable); err != nil {
		return err
	}
	// Whoever started us is gone when our stdin ends, however it ended.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println(port)
	return m.serve(listener)
}

func (m *mock) load(one scriptPlan) (*script, error) {
	raw, err := os.ReadFile(one.File)
	if err != nil {
		return nil, err
	}
	var frames [][]byte
	for len(raw) > 0 {
		end := bytes.Index(raw, []byte("\n\n"))
		if end < 0 {
			return nil, fmt.Errorf("%s does not end with an empty line", one.File)
		}
		frames = append(frames, raw[:end+2])
		raw = raw[end+2:]
	}
	last := []byte("0\r\n\r\n")
	made := &script{pace: one.Pace * 1000}
	made.lead = append([]byte(m.plan.Head), "Transfer-Encoding: chunked\r\n\r\n"...)
	lead := min(one.Lead, len(frames))
	made.lead = m.chunks(made.lead, frames[:lead])
	if lead == len(frames) {
		made.lead = append(made.lead, last...)
	} else {
		tail := min(one.Tail, len(frames)-lead)
		for _, frame := range frames[lead : len(frames)-tail] {
			made.steps = append(made.steps, m.chunks(nil, [][]byte{frame}))
		}
		made.steps = append(made.steps, append(m.chunks(nil, frames[len(frames)-tail:]), last...))
	}
	// A huge one is shared by all who read it, so nothing is stamped there.
	if len(made.lead) < 1<<20 {
		for at := 0; ; at += len(stampHole) {
			found := bytes.Index(made.lead[at:], stampHole)
			if found < 0 {
				break
			}
			at += found
			made.holes = append(made.holes, at)
		}
	}
	return made, nil
}

// chunks frames events as the backend's server does: a chunk for each, or one for all that are written at once.
func (m *mock) chunks(into []byte, frames [][]byte) []byte {
	if m.plan.Merged && len(frames) > 1 {
		frames = [][]byte{bytes.Join(frames, nil)}
	}
	for _, frame := range frames {
		into = append(strconv.AppendInt(into, int64(len(frame)), 16), "\r\n"...)
		into = append(append(into, frame...), "\r\n"...)
	}
	return into
}

func (m *mock) serve(listener int) error {
	for {
		wait := time.Duration(-1)
		if len(m.waiting) > 0 {
			wait = max(0, time.Duration(m.waiting[0].due-now()))
		}
		events, err := m.poller.wait(wait)
		if err != nil {
			return err
		}
		for _, event := range events {
			fd := int(event.Fd)
			if fd == listener {
				m.accept(listener)
				continue
			}
			conn := m.conns[fd]
			if conn == nil {
				continue
			}
			if event.Events&writable != 0 {
				m.flush(conn)
			}
			if event.Events&^writable != 0 && m.conns[fd] == conn {
				m.read(conn)
			}
		}
		for at := now(); len(m.waiting) > 0 && m.waiting[0].due <= at; {
			m.step(m.waiting[0])
		}
	}
}

func (m *mock) accept(listener int) {
	for {
		fd, _, err := syscall.Accept4(listener, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		noDelay(fd)
		if m.poller.add(fd, readable) != nil {
			_ = syscall.Close(fd)
			continue
		}
		m.conns[fd] = &mockConn{fd: fd}
		m.stats.Connections++
		m.stats.Open++
	}
}

func (m *mock) close(conn *mockConn) {
	if conn.answer != nil || len(conn.out) > 0 {
		m.stats.Aborted++
	}
	if conn.answer != nil {
		m.forget(conn.answer)
	}
	delete(m.conns, conn.fd)
	_ = syscall.Close(conn.fd)
	m.stats.Open--
}

func (m *mock) read(conn *mockConn) {
	n, errno := rawRead(conn.fd, m.buffer)
	if errno == syscall.EAGAIN {
		return
	}
	if errno != 0 || n == 0 {
		m.close(conn)
		return
	}
	data := m.buffer[:n]
	for len(data) > 0 {
		if !conn.inBody {
			var whole bool
			if data, whole = m.readHead(conn, data); !whole {
				return
			}
		}
		rest, err := conn.body.take(data, func(piece []byte) { m.look(conn, piece) })
		if err != nil {
			m.close(conn)
			return
		}
		data = rest
		if conn.body.state == done {
			conn.inBody = false
			if !m.reply(conn) {
				return
			}
		}
	}
}

// readHead takes the head of a request off data; what is left of it is the body's.
func (m *mock) readHead(conn *mockConn, data []byte) ([]byte, bool) {
	before := len(conn.head)
	conn.head = append(conn.head, data...)
	end := bytes.Index(conn.head, []byte("\r\n\r\n"))
	if end < 0 {
		if len(conn.head) > maxHead {
			m.close(conn)
		}
		return nil, false
	}
	head, rest := conn.head[:end+2], data[end+4-before:]
	conn.path, conn.post, conn.script, conn.carry = "", false, nil, conn.carry[:0]
	if words := bytes.SplitN(head[:bytes.IndexByte(head, '\r')], []byte(" "), 3); len(words) == 3 {
		path, _, _ := bytes.Cut(words[1], []byte("?"))
		conn.path, conn.post = string(path), string(words[0]) == "POST"
	}
	conn.last = sameLettersOrNil(header(head, "connection:"), "close")
	length, _ := number(header(head, "content-length:"))
	conn.body = body{left: length}
	if header(head, "transfer-encoding:") != nil {
		conn.body = body{chunked: true}
	}
	conn.inBody, conn.head = true, conn.head[:0]
	if !conn.body.chunked && length == 0 {
		conn.inBody = false
		return rest, m.reply(conn) && len(rest) > 0
	}
	return rest, len(rest) > 0
}

func sameLettersOrNil(text []byte, lower string) bool {
	return len(text) == len(lower) && sameLetters(text, lower)
}

// look finds out what is asked for, in a body that comes in pieces.
func (m *mock) look(conn *mockConn, piece []byte) {
	if conn.script != nil {
		return
	}
	if len(conn.carry) > 0 {
		joined := append(conn.carry, piece[:min(len(piece), longestName+len(marker))]...)
		if conn.script = m.named(joined); conn.script != nil {
			return
		}
	}
	if conn.script = m.named(piece); conn.script != nil {
		return
	}
	conn.carry = append(conn.carry[:0], piece[max(0, len(piece)-longestName-len(marker)):]...)
}

func (m *mock) named(text []byte) *script {
	for {
		at := bytes.Index(text, marker)
		if at < 0 {
			return nil
		}
		text = text[at+len(marker):]
		if end := bytes.IndexByte(text[:min(len(text), longestName)], '.'); end >= 0 {
			if found := m.scripts[string(text[:end])]; found != nil {
				return found
			}
		}
	}
}

func (m *mock) reply(conn *mockConn) bool {
	m.stats.Requests++
	if conn.path == "/_mock" {
		m.stats.Playing = 0
		for _, other := range m.conns {
			if other.answer != nil || len(other.out) > 0 {
				m.stats.Playing++
			}
		}
		raw, _ := json.Marshal(m.stats)
		return m.page(conn, "200 OK", string(raw))
	}
	if page, ok := m.plan.Pages[conn.path]; ok && !conn.post {
		return m.page(conn, "200 OK", page)
	}
	if !conn.post || (conn.path != "/backend-api/codex/responses" && conn.path != "/v1/responses") || conn.script == nil || conn.answer != nil {
		m.stats.Refused++
		return m.page(conn, "404 Not Found", `{"detail":"nothing is played for this"}`)
	}
	m.serial++
	lead := conn.script.lead
	if len(conn.script.holes) > 0 {
		lead = append([]byte(nil), lead...)
		stamp := fmt.Appendf(nil, "%012x", m.serial)
		for _, at := range conn.script.holes {
			copy(lead[at:], stamp)
		}
	}
	if len(conn.script.steps) > 0 {
		// Spread over the pace by the golden ratio, so that streams begun together do not tick together.
		phase := (m.serial * 618_034) % 1_000_000 * conn.script.pace / 1_000_000
		conn.answer = &answer{script: conn.script, due: now() + 1 + phase, conn: conn}
		heap.Push(&m.waiting, conn.answer)
	} else {
		m.stats.Completed++
	}
	return m.write(conn, lead)
}

func (m *mock) page(conn *mockConn, status, text string) bool {
	return m.write(conn, fmt.Appendf(nil,
		"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(text), text))
}

func (m *mock) step(one *answer) {
	data := one.script.steps[one.next]
	one.next++
	if one.next == len(one.script.steps) {
		m.stats.Completed++
		m.forget(one)
		one.conn.answer = nil
	} else {
		one.due += one.script.pace
		heap.Fix(&m.waiting, one.index)
	}
	m.write(one.conn, data)
}

func (m *mock) forget(one *answer) {
	if one.index >= 0 {
		heap.Remove(&m.waiting, one.index)
	}
}

func (m *mock) write(conn *mockConn, data []byte) bool {
	if len(conn.out) == 0 {
		n, errno := rawWrite(conn.fd, data)
		if errno != 0 && errno != syscall.EAGAIN {
			m.close(conn)
			return false
		}
		if errno == 0 {
			m.sent(conn, n)
			data = data[n:]
		}
	}
	if len(data) == 0 {
		return m.rest(conn)
	}
	if conn.out == nil {
		// Not copied: a script's bytes never change, and a huge one is shared.
		conn.out = data
	} else {
		conn.out = append(append([]byte(nil), conn.out...), data...)
	}
	if !conn.outOpen {
		conn.outOpen = true
		_ = m.poller.change(conn.fd, readable|writable)
	}
	return true
}

func (m *mock) flush(conn *mockConn) {
	if len(conn.out) > 0 {
		n, errno := rawWrite(conn.fd, conn.out)
		if errno == syscall.EAGAIN {
			return
		}
		if errno != 0 {
			m.close(conn)
			return
		}
		m.sent(conn, n)
		conn.out = conn.out[n:]
	}
	if len(conn.out) == 0 {
		conn.out = nil
		if conn.outOpen {
			conn.outOpen = false
			_ = m.poller.change(conn.fd, readable)
		}
		m.rest(conn)
	}
}

// sent counts what has left of answers; pages, such as the one that tells of it, are none.
func (m *mock) sent(conn *mockConn, n int) {
	if conn.script != nil {
		m.stats.SentBytes += int64(n)
	}
}

// rest closes a connection that was asked to be closed, once all is written.
func (m *mock) rest(conn *mockConn) bool {
	if conn.last && conn.answer == nil {
		m.close(conn)
		return false
	}
	return true
}

// answers is a heap of those that go on by themselves, the soonest first.
type answers []*answer

func (a answers) Len() int           { return len(a) }
func (a answers) Less(i, j int) bool { return a[i].due < a[j].due }
func (a answers) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].index, a[j].index = i, j
}
func (a *answers) Push(one any) {
	added := one.(*answer)
	added.index = len(*a)
	*a = append(*a, added)
}
func (a *answers) Pop() any {
	last := (*a)[len(*a)-1]
	last.index = -1
	*a = (*a)[:len(*a)-1]
	return last
}
